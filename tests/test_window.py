"""The teacher's forward for several micro-batches at once (`teacher.window`): the same losses, fewer forwards."""

import pytest
import tiny_runs as runs
import torch
from test_losses import PAIRS, interact_module
from test_packing import NAMES, PACKED, ROWS, TEXT, encoded, families, processor
from tiny_batch import ROWS as PROMPTS
from tiny_batch import make_batch
from tiny_batch import processor as tiny_processor

from vlsi_fast import load_config, run
from vlsi_fast.backbones import family_of
from vlsi_fast.config import ConfigError
from vlsi_fast.data import Collator
from vlsi_fast.data.packing import Packer
from vlsi_fast.hidden_states import VerbalizedBackbone, answer_positions
from vlsi_fast.stages.batches import StageCollator
from vlsi_fast.stages.window import join

# ---- micro-batches joined are the batch of all their rows ----


def collators(name):
    """Padded and, where the family can be, packed, with a blank image where no row has one."""
    config = families.make_model(name, tokenizer=processor(name).tokenizer).config
    for packers in ({}, {"student": Packer(config)})[: 2 if name in PACKED else 1]:
        yield Collator({"student": processor(name)}, True, packers)


def joined(collator, groups):
    parts = [StageCollator(collator, ("student",))(rows) for rows in groups]
    blank = ["student" in part["facts"]["blank"] for part in parts]
    return join([part["batch"]["student"] for part in parts], blank, *collator.token_and_names("student")), blank


def rows_of(name, rows):
    return [{"id": str(i), "skipped": [], "student": row} for i, row in enumerate(encoded(name, rows))]


@pytest.mark.parametrize("name", NAMES)
def test_joined_micro_batches_are_one_batch(name):
    """Tensor by tensor, where every micro-batch has an image; rows of several images and of none."""
    rows = rows_of(name, [ROWS[0], ROWS[2], ROWS[1], ROWS[3], ROWS[3]])
    for collator in collators(name):
        (inputs, index), blank = joined(collator, [rows[:1], rows[1:3], rows[3:]])
        whole = StageCollator(collator, ("student",))(rows)["batch"]["student"]
        assert blank == [False] * 3 and inputs.keys() == whole["inputs"].keys()
        for key, value in whole["inputs"].items():
            for found, wanted in zip(flat(inputs[key]), flat(value), strict=True):
                assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted)), key
        assert torch.equal(index, whole["index"])


def flat(value):
    return value.values() if isinstance(value, dict) else [value]


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3], [1, 0]], [[0, 1], [1, 0]], [[2, 3], [0, 1]]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_blank_images_disturb_no_other(name, groups):
    """What a model says to rows without images, with, and without again; each micro-batch alone is the truth."""
    rows = rows_of(name, [*TEXT, ROWS[0], ROWS[2]])
    model = families.make_model(name, tokenizer=processor(name).tokenizer)
    backbone = VerbalizedBackbone(model, [], None, train_backbone=False)
    for collator in collators(name):
        parts = [[rows[i] for i in group] for group in groups]
        (inputs, index), blank = joined(collator, parts)
        assert blank == [group[0] < 2 for group in groups]
        _, together = backbone(inputs, index)
        alone = [StageCollator(collator, ("student",))(part)["batch"]["student"] for part in parts]
        alone = torch.cat([backbone(one["inputs"], one["index"])[1] for one in alone])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-5)


# ---- the module: taught ahead or in its own forward ----


@pytest.mark.parametrize(
    ("intermediate", "last", "headless", "divergence"),
    [(*pair, "forward_kl") for pair in PAIRS if {"kld", "l2"} & set(pair[:2])]
    + [("kld", "kld", False, "jsd"), ("kld", "ce", False, "reverse_kl"), ("none", "kld", False, "jsd")],
)
def test_taught_ahead_is_taught_in_its_turn(intermediate, last, headless, divergence):
    """Loss, parts, matrix, matches and gradients of two micro-batches of unequal length, for every operation."""
    module = interact_module(intermediate, last, headless, divergence=divergence)
    batches = []
    for rows in (PROMPTS[1:], PROMPTS[:1]):
        inputs, labels = make_batch(rows)
        index, wanted = answer_positions(labels)
        batches.append({"inputs": inputs, "index": index, "labels": wanted})
    vision = set(tiny_processor().image_processor.model_input_names)
    counts = [batch["index"].numel() for batch in batches]
    taught = module.teach(*join(batches, [False, False], 0, vision), counts)
    for i, batch in enumerate(batches):
        outputs = []
        for given in ({"taught": taught[i]}, {"teacher": batch}):
            module.zero_grad()
            output = module(student=batch, **given, generator=torch.Generator().manual_seed(i))
            output["loss"].backward()
            gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
            outputs.append([*(value.detach() for value in output.values()), *gradients])
        assert len(outputs[0]) > 10
        for found, wanted in zip(*outputs, strict=True):
            scale = float(wanted.abs().max())
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6 * max(scale, 1))


def test_only_what_losses_read_is_kept():
    """1 + d_s numbers an answer token and layer; hidden states for the losses that need those."""
    inputs, labels = make_batch()
    index, _ = answer_positions(labels)
    n = index.numel()
    for settings, layers, last in (
        (("kld", "kld"), None, None),
        (("l2", "kld"), (3, n, 48), None),
        (("kld", "l2"), None, (n, 48)),
    ):
        (taught,) = interact_module(*settings).teach(inputs, index, [n])
        assert taught.compared.neg_entropy.shape[1:] == (n,) and taught.compared.expectation.shape[1:] == (n, 32)
        assert taught.compared.expectation.shape[0] == 3 + (settings[1] == "kld")
        assert (taught.layers is None) == (layers is None) and (taught.last is None) == (last is None)
        assert layers is None or taught.layers.shape == layers
        assert last is None or taught.last.shape == last


# ---- whole runs ----


def config_of(workspace, verbalized, output, window, accumulation=4, **training):
    """Ten rows a pass, so that a step at the pass's end has fewer micro-batches; sampled matches."""
    tree = runs.settings(
        workspace,
        output,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        save_steps=2,
        save_total_limit=None,
        **training,
    ) | {"matching": {}}
    tree["data"]["train"][0]["limit"] = 12
    tree["teacher"]["window"] = window
    for role in ("student", "teacher"):
        tree[role]["verbalizers"] = str(verbalized / "verbalize" / role)
    return tree


@pytest.fixture(scope="module")
def verbalized(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verbalized")
    tree = runs.settings(workspace, folder, max_steps=2)
    run(load_config(runs.write_config(tree, folder / "config.yaml")), "verbalize")
    return folder


@pytest.fixture(scope="module")
def plain(workspace, verbalized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    interact(config_of(workspace, verbalized, folder, 1), folder)
    return runs.metrics(folder, "interact")


def interact(tree, folder, resume=False):
    config = runs.write_config(tree, folder.parent / f"{folder.name}.yaml")
    return run(load_config(config), "interact", resume)


EXACT = ("step", "rows", "answer_tokens", "matches", "learning_rate", "padding_share", "student_layers")


def same(found, expected, tolerance=1e-6):
    for a, b in zip(found, expected, strict=True):
        assert {k: a.get(k) for k in EXACT} == {k: b.get(k) for k in EXACT}
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert torch.tensor(a["kl"]).allclose(torch.tensor(b["kl"]), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "sections", "calls"),
    [
        (3, {}, [2, 1, 2]),  # 4 micro-batches in two forwards, or the 2 of a pass's last step in one
        (100, {}, [1] * 3),
        (2, {"data": {"padding_free": True}}, [2, 1, 2]),
        (2, {"training": {"balance_batch": True}}, [2, 1, 2]),
        ("auto", {}, [4, 2, 4]),
    ],
    ids=["3", "all", "packed", "balanced", "auto"],
)
def test_window_changes_no_loss(workspace, verbalized, plain, tmp_path, monkeypatch, window, sections, calls):
    """And the teacher runs as often as it says."""
    counted = count_forwards(monkeypatch)
    tree = config_of(workspace, verbalized, tmp_path / "run", window)
    for name, value in sections.items():
        tree[name] |= value
    record = interact(tree, tmp_path / "run")["interact"]
    assert sum(counted) == sum(calls)
    assert record["summary"]["teacher_window"] == {"auto": 1, 100: 4}.get(window, window)
    expected = plain
    if sections:
        tree = config_of(workspace, verbalized, tmp_path / "one", 1)
        for name, value in sections.items():
            tree[name] |= value
        interact(tree, tmp_path / "one")
        expected = runs.metrics(tmp_path / "one", "interact")
    same(runs.metrics(tmp_path / "run", "interact"), expected)


def count_forwards(monkeypatch):
    """A list that gets a 1 for each forward of a teacher's first decoder layer."""
    from vlsi_fast import teacher

    calls, load = [], teacher.load_teacher

    def counted(*arguments):
        held = load(*arguments)
        layer = family_of(held.model.config).decoder_layers(held.model)[0]
        layer.register_forward_hook(lambda *_: calls.append(1))
        return held

    monkeypatch.setattr("vlsi_fast.stages.stage.load_teacher", counted)
    return calls


def test_resumed_run_is_the_same(workspace, verbalized, tmp_path):
    """To the last digit."""
    tree = config_of(workspace, verbalized, tmp_path / "run", 3)
    interact(tree, tmp_path / "run")
    whole = runs.losses(tmp_path / "run", "interact")
    runs.rewind(tmp_path / "run" / "interact", 2)
    interact(tree, tmp_path / "run", resume=True)
    assert runs.losses(tmp_path / "run", "interact") == whole


@pytest.mark.parametrize("window", [0, "many", 1.5, -2])
def test_windows_that_are_none(workspace, tmp_path, window):
    tree = runs.settings(workspace, tmp_path / "run")
    tree["teacher"]["window"] = window
    with pytest.raises(ConfigError, match="teacher.window"):
        load_config(runs.write_config(tree, tmp_path / "config.yaml"))


# ---- ZeRO-3: an engine of its own ----


@pytest.fixture(scope="module")
def on_two_ranks(workspace, verbalized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("window")
    jobs = []
    for mode in ("zero3", "replicated", "offload"):
        for window in (1, 2):
            output = folder / f"{mode}_{window}"
            training = {"deepspeed": runs.zero3(), "gradient_checkpointing": True}
            tree = config_of(workspace, verbalized, output, window, 2, **training)
            tree["teacher"]["mode"] = mode
            jobs.append(("interact", runs.write_config(tree, folder / f"{output.name}.yaml")))
    runs.train_several("--fresh", *jobs, launcher="torchrun")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero3", "replicated", "offload"])
def test_window_changes_no_loss_on_two_ranks(on_two_ranks, plain, mode):
    found = runs.metrics(on_two_ranks / f"{mode}_2", "interact")
    same(found, runs.metrics(on_two_ranks / f"{mode}_1", "interact"))
    same(found, plain, 1e-4)
