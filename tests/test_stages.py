"""The three stages end to end on tiny models: results, lineage, resumption, counts, failures."""

import importlib.metadata
import json
import math
import shutil
import signal
import subprocess
import time

import pytest
import tiny_runs as runs
import torch
from transformers import Qwen2VLForConditionalGeneration

from vlsi_fast import load_config, run
from vlsi_fast.config import ConfigError
from vlsi_fast.data import TooManySkippedRows
from vlsi_fast.data.skipped import SkipLog
from vlsi_fast.lineage import LineageError, read_record
from vlsi_fast.loading import load_backbone
from vlsi_fast.stages.arguments import DEEPSPEED_FLOOR
from vlsi_fast.stages.trainer import NonFiniteLossError


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory):
    """A whole run, in this process."""
    output = tmp_path_factory.mktemp("finished") / "run"
    config = runs.write_config(runs.settings(workspace, output), output.parent / "config.yaml")
    run(load_config(config), "all")
    return output, config


def start(workspace, output, stage="all", resume=False, training=None, **sections):
    tree = runs.settings(workspace, output, **(training or {}))
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    path = runs.write_config(tree, output.parent / f"{output.name}.yaml")
    return run(load_config(path), stage, resume)


def copy_run(source, target, *stages):
    for stage in stages:
        shutil.copytree(source / stage, target / stage)
    return target


# ---- results ----


def test_every_stage_leaves_a_finished_record(finished):
    output, _ = finished
    for stage in ("verbalize", "interact", "sft"):
        record = read_record(output / stage)
        assert record["state"] == "finished"
        assert record["summary"]["optimizer_steps"] == 3
        assert record["summary"]["answer_tokens"] == sum(r["answer_tokens"] for r in runs.metrics(output, stage)) > 0
        assert record["facts"]["student"]["layers"] == [1, 2, 3]
        assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]


@pytest.mark.parametrize("stage", ["interact", "sft"])
def test_result_is_a_stock_checkpoint_that_generates(finished, stage):
    output, _ = finished
    from vlsi_fast.data import load_processor

    folder = output / stage / "student"
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    processor = load_processor(folder)
    turns = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[prompt], return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert new.shape[1] > inputs["input_ids"].shape[1]
    names = {p.name for p in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)


def test_merged_student_equals_base_plus_adapter(finished, workspace):
    """Stock transformers + peft on the base checkpoint give the exported student's logits."""
    from peft import PeftModel

    output, _ = finished
    ids = torch.arange(12)[None] + 30
    base = load_backbone(workspace / "student", "float32")
    before = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, output / "interact" / "adapter")
    exported = Qwen2VLForConditionalGeneration.from_pretrained(output / "interact" / "student")
    with torch.no_grad():
        torch.testing.assert_close(exported(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        assert (exported(input_ids=ids).logits - before).abs().max() > 1e-3


def test_sft_trains_the_language_model_and_not_the_vision_tower(finished):
    output, _ = finished
    before = dict(load_backbone(output / "interact" / "student", "float32").named_parameters())
    after = dict(load_backbone(output / "sft" / "student", "float32").named_parameters())
    for name, parameter in after.items():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("visual" not in name), name


def test_verbalizers_load_alone_and_have_learnt(finished):
    from vlsi_fast.verbalizer import Verbalizers

    output, _ = finished
    verbalizers = Verbalizers.from_pretrained(output / "verbalize" / "teacher")
    assert verbalizers.spec.layers == (1, 2, 3, 4, 5)
    first, last = runs.metrics(output, "verbalize")[0], runs.metrics(output, "verbalize")[-1]
    assert last["loss"] < first["loss"]


def test_records_hold_what_the_readme_promises(finished):
    output, _ = finished
    record = runs.metrics(output, "interact")[-1]
    parts = [value for name, value in record.items() if name.startswith("loss/")]
    assert [name for name in record if name.startswith("loss/")] == [
        "loss/student_layer_1",
        "loss/student_layer_2",
        "loss/student_layer_3",
        "loss/last",
    ]
    assert math.isclose(sum(parts), record["loss"], rel_tol=1e-9)
    assert len(record["kl"]) == 3 and len(record["kl"][0]) == 5
    # uniform matching: student layer i -> teacher layer i, once a micro-batch
    assert record["matches"] == [[2, 0, 0, 0, 0], [0, 2, 0, 0, 0], [0, 0, 2, 0, 0]]
    matched = [record["kl"][i][i] for i in range(3)]
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(parts[:3], matched))
    for name in ("learning_rate", "answer_tokens", "tokens_per_second", "step_seconds", "peak_memory_bytes"):
        assert record[name]


@pytest.mark.parametrize("version, message", [("0.19.1", "rounds a model's buffers.*deepspeed>=0.19.2"), (None, "not")])
def test_a_deepspeed_that_cannot_serve_is_named(workspace, tmp_path, monkeypatch, version, message):
    find = importlib.metadata.version

    def found(name):
        if name != "deepspeed":
            return find(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(importlib.metadata, "version", found)
    with pytest.raises(ConfigError, match=message):
        start(workspace, tmp_path / "run", "verbalize", training={"deepspeed": str(runs.ROOT / "configs/zero3.json")})


def test_the_floor_of_deepspeed_is_that_of_the_package():
    assert f"deepspeed>={DEEPSPEED_FLOOR}" in (runs.ROOT / "pyproject.toml").read_text()


def test_tensorboard_has_the_layers(workspace, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(workspace, tmp_path / "run", "verbalize", training={"report_to": ["tensorboard"]})
    events = EventAccumulator(str(tmp_path / "run" / "verbalize" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "train/loss/student_layer_1" in tags and "train/loss/teacher_layer_5" in tags
    assert len(events.Scalars("train/loss")) == 3


# ---- the same numbers by another way ----


@pytest.mark.parametrize("stage", ["verbalize", "interact", "sft"])
def test_accumulation_8x1_equals_1x8(workspace, finished, tmp_path, stage):
    """Ragged answers: a mean of means would differ."""
    found = []
    for rows, micro_batches in ((1, 8), (8, 1)):
        output = tmp_path / f"{rows}x{micro_batches}"
        previous = {"interact": ["verbalize"], "sft": ["interact"]}.get(stage, [])
        copy_run(finished[0], output, *previous)
        training = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
        # SGD without clipping: unlike Adam's, its steps show a wrong factor on the gradients
        training |= {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        start(workspace, output, stage, training=training)
        found.append(runs.metrics(output, stage))
    for one, eight in zip(*found, strict=True):
        assert one["answer_tokens"] == eight["answer_tokens"]
        assert math.isclose(one["loss"], eight["loss"], rel_tol=5e-5), (one["loss"], eight["loss"])
    assert found[0][0]["loss"] != pytest.approx(found[0][-1]["loss"], rel=1e-3)


def test_loss_is_the_mean_over_answer_tokens(workspace, tmp_path):
    """First sft step against stock transformers on the same rows, one by one."""
    from vlsi_fast.data import VlsiDataset, build_source, load_processor

    start(workspace, tmp_path / "run", "sft", training={"max_steps": 1}, sft={"start_from": "base"})
    record = runs.metrics(tmp_path / "run", "sft")[0]
    config = load_config(tmp_path / "run.yaml")
    processor = load_processor(workspace / "student")
    dataset = VlsiDataset(build_source(config.data.train), {"student": processor}, config.data)
    model = load_backbone(workspace / "student", "float32")
    sums = {}
    for i in range(len(dataset)):
        row = dataset[i]["student"]
        with torch.no_grad():
            count = int((row["labels"][:, 1:] != -100).sum())
            sums[i] = (float(model(**row).loss) * count, count)
    # the sampler's choice is not ours to know: find the four rows by their answer tokens and loss
    import itertools

    target = record["loss"]
    hits = [
        c
        for c in itertools.combinations(sums, 4)
        if sum(sums[i][1] for i in c) == record["answer_tokens"]
        and math.isclose(sum(sums[i][0] for i in c) / record["answer_tokens"], target, rel_tol=1e-5)
    ]
    assert hits


def test_killed_and_resumed_equals_uninterrupted(workspace, tmp_path):
    """kill -9 after a checkpoint, then --resume: the same losses to the last digit, sampled matches included."""
    sections = {"matching": {"strategy": "multinomial"}}
    steps = {"max_steps": 12, "save_steps": 2, "save_total_limit": 1}
    start(workspace, tmp_path / "whole", "verbalize", training={"max_steps": 2})
    start(workspace, tmp_path / "whole", "interact", training=steps, **sections)
    copy_run(tmp_path / "whole", tmp_path / "killed", "verbalize")
    tree = runs.settings(workspace, tmp_path / "killed", **steps) | {"matching": {"strategy": "multinomial"}}
    config = runs.write_config(tree, tmp_path / "killed.yaml")
    process = subprocess.Popen(
        runs.train_command(config, "interact"),
        cwd=runs.ROOT,
        env=runs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = tmp_path / "killed" / "interact"
    deadline = time.time() + runs.LIMIT
    while not list(folder.glob("checkpoint-*/manifest.json")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(runs.metrics(tmp_path / "killed", "interact")) < 12
    run(load_config(config), "interact", resume=True)
    keep = ("step", "loss", "kl", "matches", "learning_rate", "answer_tokens")
    whole, resumed = (
        [{k: record[k] for k in keep} for record in runs.metrics(tmp_path / name, "interact")]
        for name in ("whole", "killed")
    )
    assert whole == resumed
    assert len({json.dumps(record["matches"]) for record in whole}) > 1


def test_resumed_at_its_last_step_a_run_only_exports(workspace, tmp_path, monkeypatch):
    """Killed between its last checkpoint and the export: no step more, and the same result."""
    from vlsi_fast.stages import STAGE_CLASSES

    training = {"max_steps": 4, "save_steps": 2}
    start(workspace, tmp_path / "whole", "sft", training=training, sft={"start_from": "base"})
    save = STAGE_CLASSES["sft"].save

    def killed(self, module):
        raise KeyboardInterrupt

    monkeypatch.setattr(STAGE_CLASSES["sft"], "save", killed)
    with pytest.raises(KeyboardInterrupt):
        start(workspace, tmp_path / "killed", "sft", training=training, sft={"start_from": "base"})
    monkeypatch.setattr(STAGE_CLASSES["sft"], "save", save)
    record = start(workspace, tmp_path / "killed", "sft", resume=True, training=training, sft={"start_from": "base"})
    assert record["sft"]["summary"]["optimizer_steps"] == 4
    assert runs.losses(tmp_path / "killed", "sft") == runs.losses(tmp_path / "whole", "sft")
    whole, resumed = (load_backbone(tmp_path / n / "sft" / "student", "float32") for n in ("whole", "killed"))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_result_made_from_something_else_is_not_taken_for_finished(workspace, finished, tmp_path):
    """interact made again in another way: sft's old result no longer counts."""
    copy_run(finished[0], tmp_path / "run", "verbalize", "sft")
    start(workspace, tmp_path / "run", "interact", matching={"strategy": "bottom"})
    with pytest.raises(LineageError, match="inputs.student: there"):
        start(workspace, tmp_path / "run", "sft", resume=True)


def test_stages_continue_in_one_data_order(finished):
    """Three stages of 12 rows read what one stage of 36 would."""
    output, _ = finished
    starts = [read_record(output / stage)["identity"]["data_start"] for stage in ("verbalize", "interact", "sft")]
    assert starts == [0, 12, 24]
    from vlsi_fast.stages.sampling import ContinuingSampler

    first = list(ContinuingSampler(48, seed=0, start=0))
    assert sorted(first) == list(range(48))
    assert list(ContinuingSampler(48, seed=0, start=24))[:24] == first[24:]
    assert list(ContinuingSampler(48, seed=1, start=0)) != first


def test_trained_verbalizers_are_not_trained_again(workspace, finished, tmp_path):
    teacher = {"verbalizers": str(finished[0] / "verbalize" / "teacher")}
    with pytest.raises(ConfigError, match="teacher.verbalizers has trained ones already"):
        start(workspace, tmp_path / "run", "verbalize", teacher=teacher)


def test_resume_leaves_finished_stages_alone(finished):
    output, config = finished
    before = {stage: runs.metrics(output, stage) for stage in ("verbalize", "interact", "sft")}
    records = run(load_config(config), "all", resume=True)
    assert all(record["state"] == "finished" for record in records.values())
    assert before == {stage: runs.metrics(output, stage) for stage in before}


# ---- options ----


@pytest.mark.parametrize(
    "intermediate, last", [("ce", "none"), ("none", "ce"), ("l2", "kld"), ("kld", "l2"), ("none", "l2"), ("ce", "kld")]
)
def test_interact_operations_of_table_4d_train(workspace, finished, tmp_path, intermediate, last):
    copy_run(finished[0], tmp_path / "run", "verbalize")
    interact = {"intermediate": intermediate, "last": last}
    start(workspace, tmp_path / "run", "interact", interact=interact, training={"max_steps": 2})
    for record in runs.metrics(tmp_path / "run", "interact"):
        layers = [name for name in record if name.startswith("loss/student_layer")]
        assert len(layers) == (0 if intermediate == "none" else 3)
        assert ("loss/last" in record) == (last != "none")
        assert math.isfinite(record["loss"]) and record["loss"] > 0


def test_headless_needs_no_verbalize_stage(workspace, tmp_path):
    interact = {"intermediate": "l2", "last": "kld", "headless": True}
    start(workspace, tmp_path / "run", "interact", interact=interact, training={"max_steps": 6})
    found = runs.losses(tmp_path / "run", "interact")
    assert found[-1] < found[0]
    assert (tmp_path / "run" / "interact" / "verbalizers" / "verbalizer.safetensors").is_file()


@pytest.mark.parametrize("architecture", ["mlp_x2", "decoder"])
def test_other_verbalizers_go_through(workspace, tmp_path, architecture):
    verbalizer = {"architecture": architecture, "norm": True}
    for stage in ("verbalize", "interact"):
        start(workspace, tmp_path / "run", stage, verbalizer=verbalizer, training={"max_steps": 2})
    assert all(map(math.isfinite, runs.losses(tmp_path / "run", "interact")))


@pytest.mark.parametrize("stage", ["verbalize", "interact", "sft"])
def test_triton_kernels_change_nothing(workspace, finished, tmp_path, stage):
    """Through Triton's interpreter where there is no GPU; uniform matching, so that a rounding cannot turn a draw."""
    pytest.importorskip("triton")
    output = copy_run(finished[0], tmp_path / "run", "verbalize", "interact")
    shutil.rmtree(output / stage, ignore_errors=True)
    start(workspace, output, stage, impl="triton")
    assert runs.losses(output, stage) == pytest.approx(runs.losses(finished[0], stage), rel=2e-5)


def test_triton_is_refused_where_it_cannot_run(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("vlsi_kernels._common.interpreted", lambda: False)
    with pytest.raises(ConfigError, match='needs tensors on a CUDA device, got cpu; .* use impl="auto"'):
        start(workspace, tmp_path / "run", "sft", impl="triton")


def test_gradient_checkpointing_changes_nothing(workspace, finished, tmp_path):
    for name, enabled in (("off", False), ("on", True)):
        copy_run(finished[0], tmp_path / name, "verbalize")
        start(workspace, tmp_path / name, "interact", training={"gradient_checkpointing": enabled})
    off, on = runs.losses(tmp_path / "off", "interact"), runs.losses(tmp_path / "on", "interact")
    assert off == pytest.approx(on, rel=1e-6)


def test_verbalizers_of_another_run_and_lora_sft(workspace, finished, tmp_path):
    """A teacher verbalized once serves many students; sft by LoRA."""
    tree = runs.settings(workspace, tmp_path / "run", max_steps=1)
    tree["teacher"]["verbalizers"] = str(finished[0] / "verbalize" / "teacher")
    tree["verbalize"] = {"models": ["student"]}
    tree["sft"] = {"method": "lora"}
    config = runs.write_config(tree, tmp_path / "config.yaml")
    records = run(load_config(config), "all")
    assert not (tmp_path / "run" / "verbalize" / "teacher").exists()
    assert records["sft"]["state"] == "finished"
    assert (tmp_path / "run" / "sft" / "adapter" / "adapter_model.safetensors").is_file()


def test_trained_student_verbalizers_are_saved(workspace, finished, tmp_path):
    from vlsi_fast.verbalizer import Verbalizers

    copy_run(finished[0], tmp_path / "run", "verbalize")
    start(workspace, tmp_path / "run", "interact", interact={"train_student_verbalizers": True})
    old = Verbalizers.from_pretrained(tmp_path / "run" / "verbalize" / "student").state_dict()
    new = Verbalizers.from_pretrained(tmp_path / "run" / "interact" / "verbalizers").state_dict()
    assert all(not torch.equal(old[name], new[name]) for name in old)


def test_bfloat16_keeps_float32_master_weights(workspace, tmp_path):
    """At this learning rate most updates are below bfloat16's resolution: without a master copy they would be lost."""
    drops = {}
    for dtype in ("float32", "bfloat16"):
        training = {"max_steps": 10, "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
        start(workspace, tmp_path / dtype, "sft", training=training, sft={"start_from": "base"}, dtype=dtype)
        losses = runs.losses(tmp_path / dtype, "sft")
        drops[dtype] = losses[0] - losses[-1]
    assert drops["float32"] > 0.01
    assert drops["bfloat16"] == pytest.approx(drops["float32"], rel=0.1)


@pytest.mark.parametrize("stage", ["verbalize", "interact"])
def test_bfloat16_goes_through(workspace, finished, tmp_path, stage):
    copy_run(finished[0], tmp_path / "run", *(["verbalize"] if stage == "interact" else []))
    start(workspace, tmp_path / "run", stage, dtype="bfloat16")
    assert runs.losses(tmp_path / "run", stage) == pytest.approx(runs.losses(finished[0], stage), rel=2e-2)


def test_teacher_and_student_see_their_own_processors_inputs(workspace, tmp_path):
    """Four times the image tokens for the teacher; answers aligned all the same."""
    import tiny

    other = tmp_path / "teacher"
    shutil.copytree(workspace / "teacher", other)
    tiny.make_processor("tiny", patch_size=8, min_pixels=4096, max_pixels=4096).save_pretrained(other)
    for stage in ("verbalize", "interact"):
        start(workspace, tmp_path / "run", stage, teacher={"path": str(other)})
    same = tmp_path / "same"
    for stage in ("verbalize", "interact"):
        start(workspace, same, stage)
    # the student's inputs and answers are those of the other run, the teacher's are not
    for record, plain in zip(runs.metrics(tmp_path / "run", "verbalize"), runs.metrics(same, "verbalize")):
        assert record["loss/student_layer_2"] == pytest.approx(plain["loss/student_layer_2"], rel=1e-5)
        assert record["loss/teacher_layer_2"] != pytest.approx(plain["loss/teacher_layer_2"], rel=1e-5)
        assert record["answer_tokens"] == plain["answer_tokens"]


# ---- bad input ----


def test_missing_predecessor(workspace, tmp_path):
    with pytest.raises(LineageError, match="run --stage verbalize first"):
        start(workspace, tmp_path / "run", "interact")
    with pytest.raises(LineageError, match="run --stage interact first"):
        start(workspace, tmp_path / "run", "sft")
    assert not (tmp_path / "run").exists()


def test_mismatched_predecessor_names_both_sides(workspace, finished, tmp_path):
    copy_run(finished[0], tmp_path / "run", "verbalize")
    tree = runs.settings(workspace, tmp_path / "run")
    tree["student"]["layers"] = [1, 3]
    config = runs.write_config(tree, tmp_path / "config.yaml")
    with pytest.raises(LineageError, match=r"student\.layers is \[1, 2, 3\] in the verbalize stage and \[1, 3\] here"):
        run(load_config(config), "interact")
    with pytest.raises(LineageError, match="'verb_ffn'.* in the verbalize stage and .*'mlp'.* here"):
        start(workspace, tmp_path / "run", "interact", verbalizer={"architecture": "mlp"})


def test_another_backbone_is_refused(workspace, finished, tmp_path):
    import tiny

    copy_run(finished[0], tmp_path / "run", "verbalize")
    other = tmp_path / "other"
    shutil.copytree(workspace / "student", other)
    tiny.make_model(hidden=32, layers=4, tied=True, patch_size=8, seed=99).save_pretrained(other)
    with pytest.raises(LineageError, match="student.checkpoint is"):
        start(workspace, tmp_path / "run", "interact", student={"path": str(other)})


def test_taken_folder(workspace, finished):
    output, config = finished
    with pytest.raises(LineageError, match="is finished; pass --resume"):
        run(load_config(config), "verbalize")
    with pytest.raises(LineageError, match=r"training.learning_rate: there 0.001, now 0.5"):
        run(load_config(config, {"training.learning_rate": 0.5}), "verbalize", resume=True)


def test_layers_out_of_range(workspace, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher.layers: \[7\] out of range.*6 decoder layers"):
        start(workspace, tmp_path / "run", "verbalize", teacher={"layers": [1, 2, 7]})


def test_different_token_ids(workspace, tmp_path):
    """Equal sizes, two ids exchanged."""
    other = tmp_path / "other"
    shutil.copytree(workspace / "teacher", other)
    tree = json.loads((other / "tokenizer.json").read_text())
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"2 tokens different ids.*'a'"):
        start(workspace, tmp_path / "run", "verbalize", teacher={"path": str(other)})


@pytest.mark.parametrize("field", ["teacher", "student"])
def test_missing_model(workspace, tmp_path, field):
    with pytest.raises(FileNotFoundError, match=f"{field}.path: .*does not exist"):
        start(workspace, tmp_path / "run", "verbalize", **{field: {"path": str(tmp_path / "nowhere")}})


def test_non_finite_loss_names_layer_and_rows_and_keeps_the_checkpoint(workspace, tmp_path, monkeypatch):
    from vlsi_fast.stages.verbalize import VerbalizeModule

    forward, calls = VerbalizeModule.forward, []

    def poisoned(self, **roles):
        output = forward(self, **roles)
        calls.append(1)
        if len(calls) == 6:  # step 3, second micro-batch
            output["parts"][1] = float("nan")
        return output

    monkeypatch.setattr(VerbalizeModule, "forward", poisoned)
    with pytest.raises(NonFiniteLossError) as caught:
        start(workspace, tmp_path / "run", "verbalize", training={"save_steps": 2, "max_steps": 4})
    message = str(caught.value)
    assert "optimizer step 3" in message and "micro-batch 1: student_layer_2" in message and "rows.jsonl#" in message
    assert [p.name for p in (tmp_path / "run" / "verbalize").glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(runs.metrics(tmp_path / "run", "verbalize")) == 2
    monkeypatch.setattr(VerbalizeModule, "forward", forward)
    start(workspace, tmp_path / "run", "verbalize", resume=True, training={"save_steps": 2, "max_steps": 4})
    assert [record["step"] for record in runs.metrics(tmp_path / "run", "verbalize")] == [1, 2, 3, 4]


def test_unusable_rows_are_skipped_counted_and_listed(workspace, tmp_path):
    rows = [json.loads(line) for line in (workspace / "rows.jsonl").read_text().splitlines()]
    rows[5]["images"] = ["images/none.png"]
    broken = workspace / "broken.jsonl"
    broken.write_text("\n".join(json.dumps(row) for row in rows))
    data = {"train": [{"reader": "messages", "path": str(broken)}], "max_skipped_share": 0.1}
    training = {"max_steps": -1, "num_train_epochs": 1}
    records = start(workspace, tmp_path / "run", "sft", data=data, training=training, sft={"start_from": "base"})
    assert records["sft"]["summary"]["skipped_rows"] == {"missing_image": 1}
    listed = (tmp_path / "run" / "sft" / "skipped_rows.jsonl").read_text()
    assert "broken.jsonl#5" in listed
    data["max_skipped_share"] = 0.01
    with pytest.raises(TooManySkippedRows, match="max_skipped_share"):
        start(workspace, tmp_path / "strict", "sft", data=data, training=training, sft={"start_from": "base"})


def test_bad_input_on_the_command_line_is_one_line(workspace, tmp_path):
    config = runs.write_config(runs.settings(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    done = runs.train(config, "verbalize", "--training.learning_rat", "1")
    assert done.returncode == 2
    assert "did you mean training.learning_rate?" in done.stdout and "Traceback" not in done.stdout


def test_the_limit_on_skipped_rows_sees_all_ranks_counts(workspace, tmp_path, monkeypatch):
    """What the log is asked to judge are the steps' own sums, those of a resumed run's earlier steps included."""
    runs.make_rows(tmp_path / "data", 16)
    for i in range(0, 16, 4):
        (tmp_path / "data" / "images" / f"{i}.png").unlink()
    train = [{"reader": "messages", "path": str(tmp_path / "data" / "rows.jsonl")}]
    options = {"data": {"train": train, "max_skipped_share": 0.9}, "sft": {"start_from": "base"}}
    judged = []
    monkeypatch.setattr(SkipLog, "check", lambda self, *counts: judged.append(counts))
    start(workspace, tmp_path / "run", "sft", training={"save_steps": 2}, **options)
    records = runs.metrics(tmp_path / "run", "sft")
    skipped, rows = ([sum(r[name] for r in records[: i + 1]) for i in range(3)] for name in ("skipped_rows", "rows"))
    assert judged == [(s, s + r) for s, r in zip(skipped, rows)] and skipped[-1] > 0
    runs.rewind(tmp_path / "run" / "sft", 2)
    start(workspace, tmp_path / "run", "sft", resume=True, training={"save_steps": 2}, **options)
    assert judged[3:] == judged[2:3]
