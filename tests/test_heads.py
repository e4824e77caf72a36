"""Frozen heads that stay whole for an optimizer step (`training.persist_heads`, `vlsi_fast.ranks.heads`)."""

import json

import pytest
import tiny
import tiny_runs as runs
import torch

from vlsi_fast import load_config, run
from vlsi_fast.config import ConfigError
from vlsi_fast.ranks.heads import FrozenHeads
from vlsi_kernels import FrozenHead

STAGES = ("verbalize", "interact", "sft")
STEPS, MICRO = 2, 3


def untied(folder):
    """Models whose heads are no embeddings, so that gathers of heads are told from others."""
    runs.make_models(folder)
    processor = tiny.make_processor("tiny", patch_size=8, min_pixels=1024, max_pixels=1024)
    model = tiny.make_model(tokenizer=processor.tokenizer, patch_size=8, hidden=32, layers=4, seed=2, tied=False)
    model.save_pretrained(folder / "student")
    runs.make_rows(folder)
    return folder


def config_of(folder, output, persist, deepspeed=True, **changes):
    """Two steps of three micro-batches, an evaluation and a checkpoint after each. All losses that read frozen heads:
    answers and own output in verbalize, the matching's KL and Jensen-Shannon in interact, answers with LoRA in sft."""
    training = {"deepspeed": runs.zero3()} if deepspeed else {}
    tree = runs.settings(
        folder,
        output,
        max_steps=STEPS,
        save_steps=1,
        save_total_limit=None,
        eval_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=MICRO,
        persist_heads=persist,
        **training,
    ) | {
        "matching": {},
        "verbalize": {"objective": "both"},
        "interact": {"divergence": "jsd"},
        "sft": {"method": "lora", "start_from": "base"},
    }
    tree["data"]["eval"] = [tree["data"]["train"][0] | {"limit": 6}]
    tree |= changes
    return runs.write_config(tree, output.parent / f"{output.name}.yaml")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    models = untied(folder / "models")
    jobs = []
    for name, persist in (("off", False), ("on", True)):
        config = config_of(models, folder / name, persist)
        jobs += [f"{name}={stage}={config}" for stage in STAGES]
        # the teacher runs for two micro-batches at once; forward KL
        path = config_of(models, folder / f"window_{name}", persist, interact={})
        tree = json.loads(path.read_text())
        tree["teacher"]["window"] = 2
        for role in ("student", "teacher"):
            tree[role]["verbalizers"] = str(folder / "off" / "verbalize" / role)
        jobs.append(f"window_{name}=interact={runs.write_config(tree, path)}")
    # the student's head is its embedding, which the engine gathers, keeps and releases as it likes
    runs.make_models(folder / "tied")
    runs.make_rows(folder / "tied")
    for name, persist in (("off", False), ("on", True)):
        jobs.append(f"tied_{name}=sft={config_of(folder / 'tied', folder / f'tied_{name}', persist)}")
    # begun without, continued with
    jobs.append(f"resumed:off:1=interact={config_of(models, folder / 'resumed', True)}")
    runs.launch_ranks("heads_ranks.py", 2, str(folder / "found.json"), *jobs)
    return folder, json.loads((folder / "found.json").read_text())


RUNS = [*(("", stage) for stage in STAGES), ("window_", "interact")]


@pytest.mark.slow
@pytest.mark.parametrize(("run", "stage"), [*RUNS, ("tied_", "sft")])
def test_losses_and_evaluations_are_those_without(two_ranks, run, stage):
    """To the last digit."""
    folder, _ = two_ranks
    kept, plain = (folder / f"{run}{name}" for name in ("on", "off"))
    found, expected = runs.metrics(kept, stage), runs.metrics(plain, stage)
    for name in ("loss", "kl", "matches", "answer_tokens", "layers"):
        assert [r.get(name) for r in found] == [r.get(name) for r in expected], name
    assert len(found) == STEPS and found[0]["loss"] != found[-1]["loss"]
    evaluations = [
        [{k: v for k, v in json.loads(line).items() if k != "runtime"} for line in text.splitlines()]
        for text in ((where / stage / "eval.jsonl").read_text() for where in (kept, plain))
    ]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 2
    records = [json.loads((where / stage / "vlsi_stage.json").read_text())["summary"] for where in (kept, plain)]
    assert [record["persist_heads"] for record in records] == [True, False]


READS = {"verbalize": ("student", "teacher"), "interact": ("student", "teacher"), "sft": ("student",)}


@pytest.mark.slow
@pytest.mark.parametrize(("run", "stage"), RUNS)
def test_each_head_is_gathered_once_a_step(two_ranks, run, stage):
    """And once an evaluation; without, as often as losses read it."""
    _, found = two_ranks
    kept, plain = (found[f"{run}{name} {stage}"] for name in ("on", "off"))
    once = dict.fromkeys(READS[stage], 1)
    for step in range(1, STEPS + 1):
        assert kept[f"step {step}"]["gathers"] == once
        for name in READS[stage]:
            least = 2 if run == "window_" and name == "teacher" else MICRO  # two windows of a step's micro-batches
            assert plain[f"step {step}"]["gathers"][name] >= least
        assert kept[f"evaluation {step}"]["gathers"] == once
        assert all(plain[f"evaluation {step}"]["gathers"][name] >= 3 for name in READS[stage])


@pytest.mark.slow
@pytest.mark.parametrize(("run", "stage"), RUNS)
def test_memory_is_released_after_the_step(two_ranks, run, stage):
    """Whole heads are alive between the micro-batches of a step, and none behind its last or an evaluation."""
    _, found = two_ranks
    kept, plain = (found[f"{run}{name} {stage}"] for name in ("on", "off"))
    for step in range(1, STEPS + 1):
        here, there = kept[f"step {step}"], plain[f"step {step}"]
        assert len(here["alive_in_step"]) == MICRO - 1
        assert [a - b for a, b in zip(here["alive_in_step"], there["alive_in_step"])] == [len(READS[stage])] * 2
        assert here["alive_after"] == there["alive_after"]
        assert kept[f"evaluation {step}"]["alive_after"] == plain[f"evaluation {step}"]["alive_after"]


@pytest.mark.slow
def test_a_run_is_continued_with_or_without(two_ranks):
    folder, found = two_ranks
    assert runs.losses(folder / "resumed", "interact") == runs.losses(folder / "off", "interact")
    steps = [name for name in found["resumed interact"] if name.startswith("step")]
    assert steps == ["step 2"]
    assert found["resumed interact"]["step 2"]["gathers"] == {"student": 1, "teacher": 1}


# ---- one process ----


def test_kept_heads_change_no_loss_in_one_process(tmp_path):
    models, losses = untied(tmp_path / "models"), []
    for name, persist in (("off", False), ("on", True)):
        config = load_config(config_of(models, tmp_path / name, persist, deepspeed=False))
        for stage in ("verbalize", "interact"):
            run(config, stage)
        losses.append([runs.losses(tmp_path / name, stage) for stage in ("verbalize", "interact")])
    assert losses[0] == losses[1]


def test_whole_heads_are_kept_for_the_run():
    """Nothing is gathered, so nothing is released; without `keep` the operators get plain tensors."""
    weights = [torch.nn.Parameter(torch.randn(6, 3), requires_grad=False) for _ in range(2)]
    heads = FrozenHeads(keep=True)
    with heads.whole(weights) as first:
        assert [head.weight is weight for head, weight in zip(first, weights)] == [True, True]
    heads.release()
    with heads.whole(weights[::-1]) as second:
        assert second[0] is first[1] and second[1] is first[0]
    with FrozenHeads().whole(weights) as plain:
        assert all(torch.equal(a, b) and not isinstance(a, FrozenHead) for a, b in zip(plain, weights))


class Sharded(torch.nn.Parameter):
    """As DeepSpeed has it: a shard that stays, a whole tensor that comes and goes."""


def test_a_head_whose_shard_changed_is_gathered_again(monkeypatch):
    import contextlib

    weight, gathers = Sharded(torch.empty(0), requires_grad=False), []
    weight.ds_id, weight.ds_tensor = 0, torch.arange(6.0)

    @contextlib.contextmanager
    def gathered(parameters, writer=None):
        for parameter in parameters:
            gathers.append(parameter)
            parameter.data = parameter.ds_tensor.clone().view(3, 2)
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    monkeypatch.setattr("vlsi_fast.ranks.heads.gathered", gathered)
    heads = FrozenHeads(keep=True)

    def read():
        with heads.whole([weight]) as (head,):
            return head.weight.flatten().tolist()

    assert read() == read() == [0, 1, 2, 3, 4, 5] and len(gathers) == 1
    weight.ds_tensor[0] = 7  # as a checkpoint that is loaded
    assert read() == [7, 1, 2, 3, 4, 5] and len(gathers) == 2
    weight.ds_tensor = torch.zeros(6)  # as one of another number of ranks
    assert read() == read() == [0] * 6 and len(gathers) == 3
    heads.release()
    assert weight.numel() == 0 and read() == [0] * 6 and len(gathers) == 4


def test_names_what_it_takes(tmp_path):
    tree = runs.settings(tmp_path, tmp_path / "run", persist_heads="sometimes")
    with pytest.raises(ConfigError, match="persist_heads"):
        load_config(runs.write_config(tree, tmp_path / "config.yaml"))
