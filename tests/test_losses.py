"""Losses against dense logits, alone and in the interact stage's module for every pair of operations of table 4d."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_batch import make_batch, make_model

from vlsi_fast.backbones import family_of
from vlsi_fast.config import MatchingConfig
from vlsi_fast.config_stages import InteractConfig
from vlsi_fast.hidden_states import VerbalizedBackbone, answer_positions
from vlsi_fast.losses import (
    AnswerLoss,
    LogitL2,
    MatchedDivergence,
    OperatorOptions,
    OwnOutputLoss,
    PairwiseKL,
    hidden_l2_matrix,
    pick,
)
from vlsi_fast.stages.interact import InteractModule
from vlsi_fast.stages.verbalize import VerbalizeModule
from vlsi_fast.verbalizer import Verbalizers, VerbalizerSpec

S, L, N, DS, DL, VOCAB = 2, 3, 7, 8, 12, 50
IMPL = "torch"


def heads(student_rows=VOCAB + 5, teacher_rows=VOCAB, seed=0):
    """Frozen heads of different widths and paddings."""
    torch.manual_seed(seed)
    shapes = ((student_rows, DS), (teacher_rows, DL))
    return [torch.nn.Parameter(torch.randn(*shape), requires_grad=False) for shape in shapes]


def hidden(tokens=N, seed=1):
    torch.manual_seed(seed)
    return torch.randn(S, tokens, DS, requires_grad=True), torch.randn(L, tokens, DL)


def gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor, retain_graph=True)[0]


def logits(states, weight, vocab=VOCAB, temperature=1.0):
    """Dense logits in float64."""
    return states.double() @ weight[:vocab].double().T / temperature


def dense_kl(student_logits, teacher_logits):
    """KL(teacher || student), mean over tokens, by PyTorch's own function."""
    return F.kl_div(
        student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="batchmean", log_target=True
    )


def dense_divergence(student_logits, teacher_logits, divergence="forward_kl", beta=0.5):
    """Mean over tokens, by the definitions."""
    if divergence == "forward_kl":
        return dense_kl(student_logits, teacher_logits)
    if divergence == "reverse_kl":
        return dense_kl(teacher_logits, student_logits)
    p, q = teacher_logits.softmax(-1), student_logits.softmax(-1)
    m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (p.log() - m) + (1 - beta) * q * (q.log() - m)).sum(-1).mean()


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


# ---- autoregressive loss ----


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("rows", [VOCAB, VOCAB + 5])
def test_answer_loss_is_cross_entropy(trainable, rows):
    weight = heads(student_rows=rows)[0].requires_grad_(trainable)
    states, _ = hidden()
    labels = torch.randint(0, VOCAB, (N,))
    module = AnswerLoss(weight, OperatorOptions(VOCAB, IMPL))
    loss = module(states, labels)
    wanted = torch.stack([F.cross_entropy(logits(layer, weight), labels) for layer in states])
    assert loss.shape == (S,) and loss.dtype == torch.float32
    close(loss, wanted)
    scale = torch.tensor([1.0, 2.0])
    for tensor in [states, weight] if trainable else [states]:
        close(gradient((loss * scale).sum(), tensor), gradient((wanted * scale).sum(), tensor))
    assert [name for name, _ in module.named_parameters()] == (["weight"] if trainable else [])


# ---- KL from a model's own last layer ----


@pytest.mark.parametrize("with_answers", [False, True])
@pytest.mark.parametrize("rows", [VOCAB, VOCAB + 5])
def test_own_output_loss_is_the_dense_kl_and_cross_entropy(with_answers, rows):
    weight = heads(student_rows=rows)[0]
    states, _ = hidden()
    last, labels = torch.randn(N, DS), torch.randint(0, VOCAB, (N,))
    loss = OwnOutputLoss(weight, OperatorOptions(VOCAB, IMPL), with_answers)(states, last, labels)
    wanted = [dense_kl(logits(layer, weight), logits(last, weight)) for layer in states]
    if with_answers:
        wanted = [kl + F.cross_entropy(logits(layer, weight), labels) for kl, layer in zip(wanted, states)]
    wanted = torch.stack(wanted)
    assert loss.shape == (S,) and loss.dtype == torch.float32
    close(loss, wanted)
    scale = torch.tensor([1.0, 2.0])
    close(gradient((loss * scale).sum(), states), gradient((wanted * scale).sum(), states))


def test_own_output_loss_of_the_last_layer_itself_is_zero():
    weight, last = heads()[0], torch.randn(N, DS)
    states = last[None].clone().requires_grad_()
    loss = OwnOutputLoss(weight, OperatorOptions(VOCAB, IMPL), False)(states, last, torch.zeros(N, dtype=torch.long))
    assert loss.abs().max() < 1e-6 and gradient(loss.sum(), states).abs().max() < 1e-6


def test_a_label_beyond_the_shared_vocabulary_shows_in_the_loss():
    weight, (states, _) = heads()[0], hidden()
    labels = torch.tensor([VOCAB] + [0] * (N - 1))
    options = OperatorOptions(VOCAB, IMPL)
    assert OwnOutputLoss(weight, options, True)(states, states[0].detach(), labels).isnan().all()


# ---- divergences of matched pairs ----


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence, beta", [("reverse_kl", 1.0), ("jsd", 0.5), ("jsd", 0.1)])
def test_matched_divergence_is_the_dense_divergence(divergence, beta, temperature):
    ws, wl = heads()
    student, teacher = hidden()
    teacher = teacher[[2, 0]]
    loss = MatchedDivergence(ws, wl, OperatorOptions(VOCAB, IMPL), beta)(student, teacher, temperature)
    pairs = [
        (logits(s, ws, temperature=temperature), logits(t, wl, temperature=temperature))
        for s, t in zip(student, teacher)
    ]
    wanted = torch.stack([dense_divergence(*pair, divergence, beta) for pair in pairs])
    assert loss.shape == (S,)
    close(loss, wanted)
    scale = torch.tensor([1.0, 2.0])
    close(gradient((loss * scale).sum(), student), gradient((wanted * scale).sum(), student))


# ---- KL of all pairs ----


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_pairwise_kl_is_kl_div_for_all_pairs(temperature):
    ws, wl = heads()
    student, teacher = hidden()
    matrix = PairwiseKL(ws, wl, OperatorOptions(VOCAB, IMPL))(student, teacher, temperature)
    assert matrix.shape == (S, L)
    dense = torch.stack(
        [
            torch.stack(
                [
                    dense_kl(logits(s, ws, temperature=temperature), logits(t, wl, temperature=temperature))
                    for t in teacher
                ]
            )
            for s in student
        ]
    )
    close(matrix, dense)
    for i in range(S):
        for j in range(L):
            close(gradient(matrix[i, j], student), gradient(dense[i, j], student))


def test_padding_rows_of_a_head_take_no_part():
    ws, wl = heads()
    student, teacher = hidden()
    options = OperatorOptions(VOCAB, IMPL)
    before = [PairwiseKL(ws, wl, options)(student, teacher), LogitL2(ws, wl, options)(student, teacher[:S])]
    ws[VOCAB:] = 1e3
    after = [PairwiseKL(ws, wl, options)(student, teacher), LogitL2(ws, wl, options)(student, teacher[:S])]
    for a, b in zip(before, after):
        assert torch.equal(a, b)


# ---- L2 ----


@pytest.mark.parametrize("vocab", [VOCAB, 20000])  # 20000 takes more than one chunk
def test_logit_l2_is_the_mean_square_of_dense_logits(vocab):
    ws, wl = heads(vocab + 5, vocab)
    student, teacher = hidden()
    teacher = teacher[[2, 0]]
    module = LogitL2(ws, wl, OperatorOptions(vocab, IMPL))
    loss = module(student, teacher)
    pairs = [F.mse_loss(logits(s, ws, vocab), logits(t, wl, vocab)) for s, t in zip(student, teacher)]
    wanted = torch.stack(pairs)
    close(loss, wanted)
    close(gradient(loss.sum(), student), gradient(wanted.sum(), student))
    close(module(student, teacher), wanted)  # from the Gram matrices of the first call


def test_hidden_l2_is_the_mean_square_of_all_pairs():
    student, teacher = torch.randn(S, N, DL, requires_grad=True), torch.randn(L, N, DL, requires_grad=True)
    matrix = hidden_l2_matrix(student, teacher)
    wanted = torch.stack([torch.stack([F.mse_loss(s, t) for t in teacher.detach()]) for s in student])
    close(matrix, wanted)
    scale = torch.rand(S, L)
    close(gradient((matrix * scale).sum(), student), gradient((wanted * scale).sum(), student))
    with pytest.raises(RuntimeError, match="unused|not have been used"):
        torch.autograd.grad(matrix.sum(), teacher)


def test_pick():
    matrix = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    assert pick(matrix, torch.tensor([2, 0])).tolist() == [4, 8]
    assert pick(matrix, torch.tensor([[2, 0], [1, 2]])).tolist() == [2.5, 24]
    assert gradient(pick(matrix, torch.tensor([[2, 0], [1, 1]])).sum(), matrix).tolist() == [[0.5, 0, 0.5], [0, 1, 0]]


# ---- no answer tokens ----


def test_no_answer_tokens_give_zero():
    ws, wl = heads()
    student, teacher = hidden(tokens=0)
    options = OperatorOptions(VOCAB, IMPL)
    trained = ws.clone().requires_grad_(True)
    losses = {
        "answer": AnswerLoss(ws, options)(student, torch.empty(0, dtype=torch.long)),
        "trained head": AnswerLoss(torch.nn.Parameter(trained), options)(student, torch.empty(0, dtype=torch.long)),
        "kl": PairwiseKL(ws, wl, options)(student, teacher),
        "logits": LogitL2(ws, wl, options)(student, teacher[:S]),
        "hidden": hidden_l2_matrix(student, torch.empty(L, 0, DS)),
        "own": OwnOutputLoss(ws, options, True)(student, torch.empty(0, DS), torch.empty(0, dtype=torch.long)),
        "reverse": MatchedDivergence(ws, wl, options, 1.0)(student, teacher[:S]),
        "jsd": MatchedDivergence(ws, wl, options, 0.3)(student, teacher[:S]),
    }
    for name, loss in losses.items():
        assert loss.numel() and not loss.any(), name
        assert gradient(loss.sum(), student).shape == student.shape, name


# ---- the stages' modules ----

STUDENT_LAYERS, TEACHER_LAYERS = [1, 3], [1, 2, 3]
OPERATIONS = ("kld", "ce", "l2", "none")
PAIRS = [(i, l, False) for i in OPERATIONS for l in OPERATIONS if (i, l) != ("none", "none")]
PAIRS += [("l2", last, True) for last in OPERATIONS]


def verbalizers_of(model, layers, seed, width=None):
    settings = SimpleNamespace(architecture="verb_ffn", norm=False, residual=False)
    torch.manual_seed(seed)
    return Verbalizers(VerbalizerSpec.of(model.config, layers, settings, width))


def student_backbone(model, verbalizers):
    """With LoRA that is not at its zero start, as in the middle of training."""
    torch.manual_seed(21)
    get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=family_of(model.config).lora_targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return VerbalizedBackbone(model, STUDENT_LAYERS, verbalizers, train_backbone=True)


def interact_module(intermediate, last, headless=False, matching=None, **settings) -> InteractModule:
    """A width-32 student and a width-48 teacher whose head has 16 further rows, wired as the stage wires them."""
    student, teacher = make_model(seed=1).requires_grad_(False), make_model(seed=2, hidden=48).requires_grad_(False)
    torch.manual_seed(5)
    vocab = student.config.get_text_config().vocab_size
    teacher.lm_head = torch.nn.Linear(48, vocab + 16, bias=False).requires_grad_(False)
    speaks = intermediate != "none"
    s = verbalizers_of(student, STUDENT_LAYERS, 3, 48 if headless else None) if speaks else None
    t = verbalizers_of(teacher, TEACHER_LAYERS, 4) if speaks and intermediate != "ce" else None
    if s is not None:
        s.requires_grad_(headless or settings.get("train_student_verbalizers", False))
    teacher_backbone = None
    if {intermediate, last} & {"kld", "l2"}:
        teacher_backbone = VerbalizedBackbone(teacher, TEACHER_LAYERS, t and t.requires_grad_(False), False)
    return InteractModule(
        student_backbone(student, s),
        teacher_backbone,
        InteractConfig(intermediate=intermediate, last=last, headless=headless, **settings),
        MatchingConfig(**(matching or {})),
        OperatorOptions(vocab, IMPL),
    ).train()


@pytest.fixture(scope="module")
def batch():
    inputs, labels = make_batch()
    index, wanted = answer_positions(labels)
    return {"inputs": inputs, "index": index, "labels": wanted}


def run(module, batch, seed=0):
    arguments = {"student": batch} | ({"teacher": batch} if module.teacher is not None else {})
    return module(**arguments, generator=torch.Generator().manual_seed(seed))


def states(backbone, batch, normed=True):
    """Verbalized [layers, N, d] and last [N, d] from stock transformers' outputs and the written-out verb-FFN."""
    output = backbone.model(**batch["inputs"], output_hidden_states=True, use_cache=False)
    flat = [h.flatten(0, 1)[batch["index"]] for h in output.hidden_states]
    spoken = []
    for k in backbone.target_layers if backbone.verbalizers is not None else []:
        block = backbone.verbalizers.layers[str(k)].blocks[0]
        assert k < len(flat) - 1, "transformers has the final norm in its last hidden state"
        h = (F.silu(flat[k] @ block.gate.T) * (flat[k] @ block.up.T)) @ block.down.T
        spoken.append(family_of(backbone.model.config).final_norm(backbone.model)(h) if normed else h)
    return spoken, flat[-1]


def dense_parts(module, batch, counts) -> list:
    """Every part of the loss from dense logits. `counts` [S, L]: how often each pair was matched."""
    settings, vocab = module.settings, module.student.model.config.get_text_config().vocab_size
    ws, labels, scale = module.student.head_weight, batch["labels"], settings.temperature
    s_layers, s_last = states(module.student, batch, not settings.headless)
    t_layers, t_last, wl = [], None, None
    if module.teacher is not None:
        t_layers, t_last = states(module.teacher, batch, not settings.headless)
        wl = module.teacher.head_weight

    def compare(operation, s, t):
        if operation == "ce":
            return F.cross_entropy(logits(s, ws, vocab), labels)
        if operation == "l2":
            return F.mse_loss(logits(s, ws, vocab), logits(t, wl, vocab))
        pair = logits(s, ws, vocab, scale), logits(t, wl, vocab, scale)
        return scale**2 * dense_divergence(*pair, settings.divergence, settings.jsd_beta)

    parts = []
    for i, s in enumerate(s_layers):
        if settings.intermediate == "ce":
            parts.append(compare("ce", s, None))
        else:
            pairs = [F.mse_loss(s, t) if settings.headless else compare(settings.intermediate, s, t) for t in t_layers]
            parts.append((torch.stack(pairs) * counts[i]).sum() / counts[i].sum())
    parts = [settings.intermediate_weight * part for part in parts]
    if settings.last != "none":
        parts.append(compare(settings.last, s_last, t_last))
    return parts


@pytest.mark.parametrize("intermediate, last, headless", PAIRS)
def test_interact_loss_is_the_dense_loss(batch, intermediate, last, headless):
    module = interact_module(intermediate, last, headless)
    check_against_dense(module, batch)


def check_against_dense(module, batch):
    output = run(module, batch)
    assert len(output["parts"]) == len(module.part_names) > 0 and not output["parts"].requires_grad
    assert ("matches" in output) == (module.matrix_shape is not None)
    parts = dense_parts(module, batch, output.get("matches"))
    close(output["parts"], torch.stack([p.double() for p in parts]), 2e-5)
    close(output["loss"], sum(p.double() for p in parts), 2e-5)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output["loss"], list(trained.values()), allow_unused=True)
    wanted = torch.autograd.grad(sum(p.double() for p in parts), list(trained.values()), allow_unused=True)
    for name, a, b in zip(trained, found, wanted):
        assert (a is None or not a.any()) == (b is None or not b.any()), name
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("matching", [{"strategy": "bottom", "k": 3}, {"strategy": "random"}], ids=str)
@pytest.mark.parametrize("intermediate", ["kld", "l2"])
def test_interact_loss_with_other_matchings(batch, intermediate, matching):
    module = interact_module(intermediate, "kld", matching=matching)
    assert run(module, batch)["matches"].sum(1).tolist() == [matching.get("k", 1)] * 2
    check_against_dense(module, batch)


DIVERGENCES = [{"divergence": "reverse_kl"}, {"divergence": "jsd", "jsd_beta": 0.3}]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d["divergence"])
@pytest.mark.parametrize(
    "intermediate, last, headless",
    [("kld", "kld", False), ("kld", "ce", False), ("none", "kld", False), ("l2", "kld", True)],
)
def test_interact_loss_with_other_divergences(batch, intermediate, last, headless, divergence):
    check_against_dense(interact_module(intermediate, last, headless, temperature=1.5, **divergence), batch)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d["divergence"])
def test_other_divergences_match_by_the_forward_kl(batch, divergence):
    """Several layers each: their mean. The recorded matrix, and with it the choice, is that of the forward KL."""
    bottom = {"strategy": "bottom", "k": 2}
    module = interact_module("kld", "kld", matching=bottom, **divergence)
    check_against_dense(module, batch)
    found, forward = run(module, batch), run(interact_module("kld", "kld", matching=bottom), batch)
    assert found["matches"].tolist() == forward["matches"].tolist()
    close(found["kl"], forward["kl"], 1e-6)
    assert (found["parts"] - forward["parts"]).abs().min() > 1e-3
    trained = interact_module("kld", "kld", train_student_verbalizers=True, **divergence)
    run(trained, batch)["loss"].backward()
    assert all(p.grad.any() for p in trained.student.verbalizers.parameters())


def test_schedule_of_the_target_layers_weight(batch):
    """By the formulas of a learning rate's decay; 0 only after the last step."""
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    wanted = {
        "constant": [0.8] * 5,
        "linear": [0.8, 0.6, 0.4, 0.2, 0.0],
        "cosine": [0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5), 0.0],
    }
    for name, weights in wanted.items():
        module = interact_module("kld", "kld", intermediate_weight=0.8, intermediate_schedule=name)
        found = [module.schedule(share)["intermediate_weight"] for share in shares]
        assert found == pytest.approx(weights, abs=1e-12), name
    arguments, draw = {"student": batch, "teacher": batch}, torch.Generator
    whole, part = (
        module(**arguments, generator=draw().manual_seed(0), intermediate_weight=w)["parts"] for w in (1.0, 0.25)
    )
    layers = len(STUDENT_LAYERS)
    close(part, torch.cat([0.25 * whole[:layers], whole[layers:]]).double(), 1e-6)
    assert interact_module("none", "kld").schedule(0.5) == {}


def test_temperature(batch):
    check_against_dense(interact_module("kld", "kld", temperature=2.0), batch)


@pytest.mark.parametrize(
    "intermediate, last, headless", [("kld", "kld", False), ("l2", "kld", True), ("ce", "none", False)]
)
def test_weight_of_the_target_layers(batch, intermediate, last, headless):
    module = interact_module(intermediate, last, headless, intermediate_weight=0.3)
    check_against_dense(module, batch)
    whole = run(interact_module(intermediate, last, headless), batch)["parts"]
    ours, layers = run(module, batch)["parts"], len(STUDENT_LAYERS)
    close(ours, torch.cat([0.3 * whole[:layers], whole[layers:]]).double(), 1e-6)


def test_recorded_matrix_is_the_dense_matrix(batch):
    """For l2 as well: its pairs are chosen by KL."""
    for intermediate in ("kld", "l2"):
        module = interact_module(intermediate, "ce")
        output = run(module, batch)
        vocab = module.student.model.config.get_text_config().vocab_size
        (s, _), (t, _) = states(module.student, batch), states(module.teacher, batch)
        ws, wl = module.student.head_weight, module.teacher.head_weight
        dense = [[dense_kl(logits(a, ws, vocab), logits(b, wl, vocab)).item() for b in t] for a in s]
        close(output["kl"], torch.tensor(dense))


def test_matches_follow_the_generator(batch):
    module = interact_module("kld", "none")
    module.matching = MatchingConfig(strategy="random")
    drawn = [run(module, batch, seed)["matches"].argmax(1).tolist() for seed in range(8)]
    assert drawn == [run(module, batch, seed)["matches"].argmax(1).tolist() for seed in range(8)]
    assert len({tuple(d) for d in drawn}) > 1


@pytest.mark.parametrize("intermediate, last, headless", PAIRS)
def test_gradient_reaches_only_what_is_trained(batch, intermediate, last, headless):
    module = interact_module(intermediate, last, headless)
    for parameter in module.teacher.parameters() if module.teacher is not None else ():
        parameter.requires_grad_(True)  # the teacher's pass itself must cut the gradient
    run(module, batch)["loss"].backward()
    touched = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("lora_A" in name for name in touched) and any("lora_B" in name for name in touched)
    others = {name for name in touched if "lora_" not in name}
    assert others == ({n for n, _ in module.named_parameters() if "student.verbalizers" in n} if headless else set())


def test_student_verbalizers_learn_when_asked(batch):
    module = interact_module("kld", "kld", train_student_verbalizers=True)
    run(module, batch)["loss"].backward()
    assert all(p.grad.any() for p in module.student.verbalizers.parameters())
    assert all(p.grad is None for p in module.teacher.parameters())


@pytest.mark.parametrize("intermediate, last", [("kld", "kld"), ("l2", "l2"), ("none", "kld")])
def test_teacher_equal_to_student(batch, intermediate, last):
    """Same weights, same verbalizers, each layer matched to itself: nothing to learn."""
    student, teacher = (make_model(seed=1).requires_grad_(False) for _ in range(2))
    s, t = (verbalizers_of(model, STUDENT_LAYERS, 3).requires_grad_(False) for model in (student, teacher))
    get_peft_model(student, LoraConfig(r=4, target_modules=family_of(student.config).lora_targets))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("language_model" in name)  # LoRA's own start would hide a gradient in A
    module = InteractModule(
        VerbalizedBackbone(student, STUDENT_LAYERS, s, True),
        VerbalizedBackbone(teacher, STUDENT_LAYERS, t, False),
        InteractConfig(intermediate=intermediate, last=last),
        MatchingConfig(strategy="uniform"),
        OperatorOptions(student.config.get_text_config().vocab_size, IMPL),
    )
    output = run(module, batch)
    if intermediate != "none":
        assert output["matches"].tolist() == [[1, 0], [0, 1]]
        assert output["kl"].diagonal().abs().max() < 1e-5 and output["kl"][0, 1] > 0.01
    assert output["parts"].abs().max() < 1e-5
    output["loss"].backward()
    gradients = [p.grad.abs().max().item() for p in student.parameters() if p.grad is not None]
    assert len(gradients) > 20 and max(gradients) < 1e-6


@pytest.mark.parametrize("intermediate, last, headless", PAIRS)
def test_interact_without_answer_tokens(batch, intermediate, last, headless):
    module = interact_module(intermediate, last, headless)
    empty = torch.empty(0, dtype=torch.long)
    output = run(module, batch | {"index": empty, "labels": empty})
    assert output["loss"].item() == 0
    output["loss"].backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() and not g.any() for g in gradients)


# ---- the verbalize stage's module ----


@pytest.mark.parametrize("objective", ["answers", "own_output", "both"])
def test_verbalize_loss_is_the_dense_loss(batch, objective):
    """Of both models, whose heads have different rows; only verbalizers get a gradient."""
    models = {"student": make_model(seed=1), "teacher": make_model(seed=2, hidden=48)}
    layers = {"student": STUDENT_LAYERS, "teacher": TEACHER_LAYERS}
    backbones = {
        name: VerbalizedBackbone(
            model.requires_grad_(False),
            layers[name],
            verbalizers_of(model, layers[name], 3),
            train_backbone=False,
            needs_last=objective != "answers",
        )
        for name, model in models.items()
    }
    vocab = models["student"].config.get_text_config().vocab_size
    module = VerbalizeModule(backbones, OperatorOptions(vocab, IMPL), objective).train()
    output = module(student=batch, teacher=batch)
    wanted = []
    for backbone in backbones.values():
        spoken, last = states(backbone, batch)
        w = backbone.head_weight
        for layer in spoken:
            own = dense_kl(logits(layer, w, vocab), logits(last, w, vocab))
            answers = F.cross_entropy(logits(layer, w, vocab), batch["labels"])
            wanted.append({"answers": answers, "own_output": own, "both": own + answers}[objective])
    assert module.part_names == [f"{name}_layer_{k}" for name in layers for k in layers[name]]
    close(output["parts"], torch.stack(wanted), 2e-5)
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(trained) == 3 * (len(STUDENT_LAYERS) + len(TEACHER_LAYERS))
    found, truth = (torch.autograd.grad(loss, trained) for loss in (output["loss"], sum(wanted)))
    for a, b in zip(found, truth):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * max(1.0, b.abs().max().item()))
