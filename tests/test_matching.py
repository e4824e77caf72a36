"""Layer matching: its distribution against Algorithm 1 by enumeration, the guarantee, the baselines, errors."""

import itertools
import math
from collections import Counter

import pytest
import torch

from vlsi_fast.matching import candidate_probabilities, draw_generator, match_layers

SWITCHES = list(itertools.product([False, True], repeat=3))


def options(switches) -> dict:
    return dict(zip(("search_range", "order_preservation", "adaptive_temperature"), switches))


# ---- Algorithm 1, enumerated with plain Python numbers ----


def algorithm_1(kl, *, search_range=True, order_preservation=True, adaptive_temperature=True, scale=2.0, eps=1e-6):
    """Path of teacher layers -> its probability. `kl` is a list of rows."""
    students, teachers = len(kl), len(kl[0])
    paths = {(): 1.0}
    for i, row in enumerate(kl):
        following = {}
        for path, so_far in paths.items():
            first = path[-1] + 1 if path and order_preservation else 0
            last = teachers - students + i if search_range else teachers - 1
            candidates = list(range(min(first, teachers - 1), last + 1))
            values = [row[c] for c in candidates]
            temperature = scale / (max(values) - min(values) + eps) if adaptive_temperature else 1.0
            weights = [math.exp(-(v - min(values)) / temperature) for v in values]
            for c, weight in zip(candidates, weights):
                following[(*path, c)] = so_far * weight / sum(weights)
        paths = following
    return paths


def chi_square(counts: Counter, expected: dict, draws: int) -> tuple[float, float]:
    """The statistic and the bound that a right sampler passes but about once in 30,000 seeds (Wilson-Hilferty).

    Cells that expect fewer than 5 draws are joined.
    """
    cells = [(counts[path], p * draws) for path, p in expected.items() if p * draws >= 5]
    rest = (draws - sum(n for n, _ in cells), draws - sum(e for _, e in cells))
    if rest[1] >= 5:
        cells.append(rest)
    elif rest[0] > 25:  # far more draws of rare paths than expected
        return math.inf, 0.0
    freedom = max(len(cells) - 1, 1)
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    return sum((n - e) ** 2 / e for n, e in cells), bound


def sample(kl: torch.Tensor, draws: int, **keywords) -> Counter:
    generator = torch.Generator().manual_seed(5)
    return Counter(tuple(match_layers(kl, generator=generator, **keywords).tolist()) for _ in range(draws))


def random_kl(students: int, teachers: int, seed: int = 0, size: float = 3.0) -> torch.Tensor:
    return torch.rand(students, teachers, generator=torch.Generator().manual_seed(seed)) * size


@pytest.mark.parametrize(
    "shape, draws", [((3, 5), 20000), ((1, 1), 50), ((1, 6), 3000), ((4, 4), 50), ((2, 7), 3000), ((4, 6), 3000)]
)
def test_draws_follow_algorithm_1(shape, draws):
    kl = random_kl(*shape)
    expected = algorithm_1(kl.tolist())
    assert sum(expected.values()) == pytest.approx(1)
    counts = sample(kl, draws)
    assert counts.keys() <= expected.keys(), "a path that Algorithm 1 never takes"
    statistic, bound = chi_square(counts, expected, draws)
    assert statistic < bound


@pytest.mark.parametrize("switches", SWITCHES[:-1], ids=str)
def test_draws_follow_the_switches(switches):
    kl, draws = random_kl(3, 5, seed=1), 2500
    expected = algorithm_1(kl.tolist(), **options(switches))
    counts = sample(kl, draws, **options(switches))
    assert counts.keys() <= expected.keys()
    statistic, bound = chi_square(counts, expected, draws)
    assert statistic < bound
    statistic, bound = chi_square(counts, algorithm_1(kl.tolist()), draws)
    assert statistic > bound, "the test would not notice that a switch does nothing"


def test_draws_follow_scale_and_eps():
    kl, draws, changed = random_kl(2, 4, seed=2, size=1.0), 3000, {"scale": 0.3, "eps": 0.5}
    counts = sample(kl, draws, **changed)
    statistic, bound = chi_square(counts, algorithm_1(kl.tolist(), **changed), draws)
    assert statistic < bound
    for one in ({"scale": 0.3}, {"eps": 0.5}):
        statistic, bound = chi_square(counts, algorithm_1(kl.tolist(), **one), draws)
        assert statistic > bound


def test_candidate_probabilities_equal_algorithm_1():
    row, candidates = torch.tensor([9.0, 1.0, 2.5, 0.5, 0.0]), torch.tensor([False, True, True, True, False])
    for adaptive in (True, False):
        p = candidate_probabilities(row, candidates, adaptive_temperature=adaptive)
        wanted = algorithm_1([[1.0, 2.5, 0.5]], adaptive_temperature=adaptive)
        assert p[~candidates].tolist() == [0, 0]
        assert p[candidates].tolist() == pytest.approx([wanted[c,] for c in range(3)], rel=1e-9)


# ---- every student layer finds a candidate ----


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_student_layer_finds_a_candidate(switches):
    generator = torch.Generator().manual_seed(0)
    ranged, ordered, _ = switches
    for trial in range(40):
        teachers = int(torch.randint(1, 9, (), generator=generator))
        students = int(torch.randint(1, teachers + 1, (), generator=generator))
        size = 10.0 ** int(torch.randint(-8, 9, (), generator=generator))
        kl = random_kl(students, teachers, seed=trial, size=size)
        matches = match_layers(kl, generator=generator, **options(switches)).tolist()
        assert len(matches) == students and all(0 <= c < teachers for c in matches)
        if ranged:
            assert all(c <= teachers - students + i for i, c in enumerate(matches))
        for before, after in itertools.pairwise(matches):
            if ordered:
                assert after > before or (not ranged and after == before == teachers - 1)


def test_equally_many_layers_leave_one_path():
    assert match_layers(random_kl(6, 6)).tolist() == [0, 1, 2, 3, 4, 5]


def test_order_without_range_shares_the_deepest_layer():
    kl = torch.full((3, 4), 100.0)
    kl[:, 3] = 0.0
    assert match_layers(kl, search_range=False).tolist() == [3, 3, 3]
    first, second, third = match_layers(kl).tolist()
    assert first < second < third == 3, "the search range keeps a deeper layer for each"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_huge_differences_choose_the_smallest(dtype):
    kl = torch.tensor([[1e4, 1.0, 1e4, 1e4], [1e4, 1e4, 1.0, 1e4]], dtype=dtype)
    for seed in range(20):
        assert match_layers(kl, generator=torch.Generator().manual_seed(seed)).tolist() == [1, 2]


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_equal_divergences_are_equally_likely(value):
    kl, draws = torch.full((2, 4), value), 2000
    statistic, bound = chi_square(sample(kl, draws), algorithm_1([[0.0] * 4] * 2), draws)
    assert statistic < bound
    p = candidate_probabilities(kl[0], torch.ones(4, dtype=torch.bool))
    assert p.tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_divergences_stay_in_range(value):
    """The loss is then not finite either and stops the run; an index out of range would hide why."""
    matches = match_layers(torch.full((3, 5), value))
    assert matches.shape == (3,) and all(0 <= c < 5 for c in matches.tolist())


# ---- baselines, by the listings of appendix D ----


@pytest.mark.parametrize("shape", [(3, 7), (2, 6), (7, 7), (7, 20), (1, 5)])
def test_uniform_is_the_listing(shape):
    students, teachers = shape
    wanted = [i * math.floor(teachers / students) for i in range(students)]
    assert match_layers(random_kl(*shape), strategy="uniform").tolist() == wanted


@pytest.mark.parametrize("k", [1, 3])
def test_bottom_is_the_listing(k):
    kl = random_kl(4, 6)
    matches = match_layers(kl, strategy="bottom", k=k)
    assert matches.shape == ((4,) if k == 1 else (4, 3))
    for row, chosen in zip(kl.tolist(), matches.tolist()):
        wanted = sorted(range(6), key=row.__getitem__)[:k]
        assert sorted([chosen] if k == 1 else chosen) == sorted(wanted)


def test_bottom_may_take_all_layers():
    assert match_layers(random_kl(2, 3), strategy="bottom", k=3).sort(1).values.tolist() == [[0, 1, 2]] * 2


def test_random_takes_every_layer_alike():
    draws = 3000
    counts = sample(random_kl(2, 4, size=1e3), draws, strategy="random")
    statistic, bound = chi_square(counts, {path: 1 / 16 for path in itertools.product(range(4), repeat=2)}, draws)
    assert statistic < bound


@pytest.mark.parametrize("strategy", ["multinomial", "random", "uniform", "bottom"])
def test_result_is_indices_without_gradient(strategy):
    kl = random_kl(2, 4).requires_grad_()
    matches = match_layers(kl, strategy=strategy)
    assert matches.dtype == torch.long and matches.shape == (2,) and not matches.requires_grad
    assert kl.gather(1, matches[:, None]).requires_grad


# ---- draws ----


@pytest.mark.parametrize("strategy", ["multinomial", "random"])
def test_draws_are_reproducible_and_apart(strategy):
    kl = random_kl(8, 20, size=0.1)

    def draw(*place):
        return tuple(match_layers(kl, strategy=strategy, generator=draw_generator(*place)).tolist())

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (0, 3, 7)]
    drawn = [draw(*place) for place in places]
    assert drawn == [draw(*place) for place in places]
    assert len(set(drawn)) == len(places), "two places of a run draw alike"


def test_draws_need_no_history():
    generator = draw_generator(3, 10, 2)
    torch.manual_seed(123)
    torch.rand(7)
    kl = random_kl(4, 9, size=0.1)
    again = draw_generator(3, 10, 2)
    assert match_layers(kl, generator=generator).tolist() == match_layers(kl, generator=again).tolist()


# ---- errors ----


@pytest.mark.parametrize(
    "kl, keywords, message",
    [
        (torch.zeros(5), {}, r"got shape \(5,\)"),
        (torch.zeros(2, 3, 1), {}, r"got shape \(2, 3, 1\)"),
        (torch.zeros(4, 3), {}, "4 student target layers but only 3 .*remove student layers"),
        (torch.zeros(4, 3), {"strategy": "uniform"}, "t_s <= t_l"),
        (torch.zeros(2, 3), {"strategy": "bottom", "k": 4}, "between 1 and the teacher's 3 target layers, got 4"),
        (torch.zeros(2, 3), {"strategy": "bottom", "k": 0}, "got 0"),
        (torch.zeros(2, 3), {"k": 2}, "k=2 applies to strategy 'bottom' only"),
        (torch.zeros(2, 3), {"strategy": "botom"}, "unknown strategy 'botom'; choose multinomial"),
    ],
)
def test_errors(kl, keywords, message):
    with pytest.raises(ValueError, match=message):
        match_layers(kl, **keywords)
