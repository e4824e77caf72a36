"""Baselines of the study of tokenizers: losses against plain loops over rows, spans and tokens."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import tokenizer_baselines as baselines  # noqa: E402

STUDENT = ["a", "b", "c", "ab", "abc", "<end>", "cb"]
TEACHER = ["<end>", "c", "b", "bca", "a", "ca", "bc", "aa"]
ROWS = ["abcab", "cabca", "b", "aaabc"]


class Names:
    """As much of a tokenizer as `Vocabularies` asks for."""

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def convert_ids_to_tokens(self, ids):
        return [self.names[i] for i in ids]


def read(text, names):
    """Ids of a text, the longest token first, and of the end."""
    ids = []
    while text:
        name = max((name for name in names if text.startswith(name)), key=len)
        ids.append(names.index(name))
        text = text[len(name) :]
    return [*ids, names.index("<end>")]


@pytest.fixture
def sides():
    """Of student and teacher: names of tokens, the rows' ids, and float64 log-probabilities of all answer tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for names in (STUDENT, TEACHER):
        ids = [read(text, names) for text in ROWS]
        said = torch.randn(sum(map(len, ids)), len(names), generator=generator, dtype=torch.float64) * 2
        found.append((names, ids, said.log_softmax(-1)))
    return found


def arguments(sides):
    labels = tuple(torch.tensor(sum(ids, [])) for _, ids, _ in sides)
    rows = tuple(torch.tensor([n for n, row in enumerate(ids) for _ in row]) for _, ids, _ in sides)
    return labels, rows, baselines.Vocabularies.of(*(Names(names) for names, _, _ in sides))


def by_row(sides):
    """[(student's ids, its rows of log-probabilities, teacher's ids, its)] as lists."""
    parts = [said.split([len(row) for row in ids]) for _, ids, said in sides]
    return zip(sides[0][1], parts[0], sides[1][1], parts[1])


def ranked(q, p):
    width = max(len(q), len(p))
    q, p = (sorted(each, reverse=True) + [0.0] * (width - len(each)) for each in (q, p))
    return sum(abs(a - b) for a, b in zip(q, p))


def test_uld(sides):
    distances = []
    for _, q, _, p in by_row(sides):
        distances += [ranked(a.exp().tolist(), b.exp().tolist()) for a, b in zip(q, p)]  # zip: up to the shorter
    (_, _, q), (_, _, p) = sides
    _, rows, _ = arguments(sides)
    assert len(distances) < min(len(q), len(p))  # in one row the student's answer is shorter, in another the teacher's
    assert baselines.uld(q, p, rows).item() == pytest.approx(sum(distances) / len(distances), rel=1e-12)


def spans(names, ids):
    """Byte at which each token ends."""
    ends = []
    for i in ids:
        ends.append((ends[-1] if ends else 0) + len(names[i]))
    return ends


def _unmatched(values, names, common):
    return [value for value, name in zip(values, names) if name not in common]


@pytest.mark.parametrize("merge", ["last", "first"])
def test_gold(sides, merge):
    (ours, _, q_all), (theirs, _, p_all) = sides
    common = [name for name in ours if name in theirs]
    share, matched, rest, several = len(common) / len(theirs), [], [], 0
    for ids, q, ids_t, p in by_row(sides):
        ends, ends_t = spans(ours, ids), spans(theirs, ids_t)
        cuts = [0, *(end for end in ends if end in ends_t)]
        for start, stop in zip(cuts, cuts[1:]):
            found = []
            for tokens, said, bounds in ((ids, q, ends), (ids_t, p, ends_t)):
                inside = [n for n, end in enumerate(bounds) if start < end <= stop]
                base = inside[-1] if merge == "last" else inside[0]
                factor = math.prod(math.exp(said[n, tokens[n]]) for n in inside if n != base)
                found.append([math.exp(value) * factor for value in said[base].tolist()])
                several += len(inside) > 1
            mine, told = found
            pairs = [(mine[ours.index(name)], told[theirs.index(name)]) for name in common]
            matched.append(sum(t * math.log(t / s) for s, t in pairs))
            rest.append(ranked(_unmatched(mine, ours, common), _unmatched(told, theirs, common)))
    wanted = share * sum(matched) / len(matched) + (1 - share) * sum(rest) / len(rest)
    labels, rows, vocabularies = arguments(sides)
    assert several >= 6
    found = baselines.gold(q_all, p_all, labels, rows, vocabularies, merge)
    assert found.item() == pytest.approx(wanted, rel=1e-12)


def test_gold_of_one_vocabulary_is_the_kl(sides):
    ours, ids, q = sides[0]
    p = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)
    labels, rows, vocabularies = arguments([(ours, ids, q), (ours, ids, p)])
    kl = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(baselines.gold(q, p, labels, rows, vocabularies), kl)


def test_answers_of_different_bytes(sides):
    names, ids, said = sides[0]
    labels, rows, vocabularies = arguments([(names, [ids[0], ids[1][1:], *ids[2:]], said), sides[1]])
    lengths = (vocabularies.student_bytes[labels[0]], vocabularies.teacher_bytes[labels[1]])
    with pytest.raises(ValueError, match="different bytes"):
        baselines.spans_of(lengths, rows)


def test_gradients_reach_the_student(sides):
    labels, rows, vocabularies = arguments(sides)
    q, p = sides[0][2].clone().requires_grad_(), sides[1][2]
    for loss in (baselines.uld(q, p, rows), baselines.gold(q, p, labels, rows, vocabularies)):
        (grad,) = torch.autograd.grad(loss, q)
        assert grad.isfinite().all() and grad.norm() > 0
