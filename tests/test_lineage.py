"""Folders, records and checkpoints that do not belong together are refused, with both sides in the message."""

import json
import shutil
import subprocess

import pytest
import tiny
import tiny_runs as runs
import torch

from vlsi_fast import lineage, load_config
from vlsi_fast.config import BackboneConfig, ConfigError
from vlsi_fast.lineage import (
    FORMAT,
    RECORD_NAME,
    LineageError,
    checkpoint_digest,
    code_commit,
    open_stage,
    read_record,
    require_predecessor,
    versions,
    write_record,
)
from vlsi_fast.loading import (
    require_same_tokens,
    resolve_folder,
    target_layers,
    tokenizer_digest,
)
from vlsi_fast.stages.stage import Role
from vlsi_fast.verbalizer import Verbalizers

RECORD = {
    "stage": "verbalize",
    "state": "running",
    "facts": {"student": {"layers": [1, 2], "verbalizer": {"architecture": "mlp"}}},
    "identity": {"seed": 0, "training": {"learning_rate": 0.1, "max_steps": 5}, "layers": [1, 2]},
}


def changed(**identity) -> dict:
    return RECORD | {"identity": RECORD["identity"] | identity}


@pytest.fixture
def stage(tmp_path):
    """A stage's folder with the record above."""
    write_record(tmp_path / "stage", RECORD)
    return tmp_path / "stage"


# ---- records ----


def test_records_round_trip(stage):
    assert read_record(stage) == {"format": FORMAT, **RECORD}
    write_record(stage, RECORD | {"state": "finished"})
    assert read_record(stage)["state"] == "finished"
    assert [p.name for p in stage.iterdir()] == [RECORD_NAME], "no partial file stays"
    assert read_record(stage / "nowhere") is None


def test_versions_name_what_results_depend_on():
    found = versions()
    assert found["torch"] and found["transformers"] and found["vlsi-fast"] != "absent"


def test_the_commit_is_that_of_this_checkout(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "vlsi_fast"
    package.mkdir()
    (package / "lineage.py").write_text("1")
    monkeypatch.setattr(lineage, "__file__", str(package / "lineage.py"))
    assert code_commit() is None  # no repository
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    assert code_commit() == git("rev-parse", "HEAD")
    (package / "lineage.py").write_text("2")
    assert code_commit() == git("rev-parse", "HEAD") + "-dirty"
    installed = package / "site-packages" / "vlsi_fast"
    installed.mkdir(parents=True)
    monkeypatch.setattr(lineage, "__file__", str(installed / "lineage.py"))
    assert code_commit() is None  # another project's repository


# ---- the own folder ----


def test_new_and_empty_folders_are_free(tmp_path):
    assert open_stage(tmp_path / "none", RECORD, resume=False) is None
    (tmp_path / "empty").mkdir()
    assert open_stage(tmp_path / "empty", RECORD, resume=True) is None


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(LineageError, match="not empty and holds no run.*another output_dir"):
            open_stage(tmp_path, RECORD, resume)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "identity, message",
    [
        ({"seed": 3}, "seed: there 0, now 3"),
        ({"layers": [1, 3]}, r"layers: there \[1, 2\], now \[1, 3\]"),
        ({"training": {"learning_rate": 0.2, "max_steps": 5}}, "training.learning_rate: there 0.1, now 0.2"),
        ({"training": {"max_steps": 5}}, "training.learning_rate: there 0.1, now None"),
        ({"world_size": 2}, "world_size: there None, now 2"),
    ],
)
def test_another_run_is_refused_with_both_values(stage, identity, message, resume):
    with pytest.raises(LineageError, match=message) as caught:
        open_stage(stage, changed(**identity), resume)
    assert str(stage) in str(caught.value) and "holds another run" in str(caught.value)
    assert "--output_dir" in str(caught.value) and str(caught.value).count("there") == 1


def test_all_differences_are_shown(stage):
    with pytest.raises(LineageError, match="(?s)layers: there.*seed: there 0, now 1"):
        open_stage(stage, changed(seed=1, layers=[2]), resume=True)


@pytest.mark.parametrize("state, words", [("running", "is unfinished"), ("finished", "is finished")])
def test_the_same_run_needs_resume(stage, state, words):
    write_record(stage, RECORD | {"state": state})
    with pytest.raises(LineageError, match=f"this very run, which {words}; pass --resume"):
        open_stage(stage, RECORD, resume=False)
    found = open_stage(stage, RECORD, resume=True)
    assert found["state"] == state


def test_tuples_are_the_lists_that_json_stores(stage):
    assert open_stage(stage, changed(layers=(1, 2)), resume=True)["state"] == "running"


# ---- the stage before ----


def test_predecessor_missing(tmp_path):
    with pytest.raises(LineageError, match="no results of the verbalize stage; run --stage verbalize first"):
        require_predecessor(tmp_path, "verbalize", {})


def test_predecessor_unfinished(stage):
    with pytest.raises(LineageError, match="is unfinished; continue it with --stage verbalize --resume"):
        require_predecessor(stage, "verbalize", {})


@pytest.mark.parametrize(
    "needs, message",
    [
        ({"student": {"layers": [1, 3]}}, r"student.layers is \[1, 2\] in the verbalize stage and \[1, 3\] here"),
        ({"student": {"verbalizer": {"architecture": "ffn"}}}, r"is {.*'mlp'} in .* {.*'ffn'}"),
        ({"teacher": {"layers": [1]}}, r"teacher.layers is None in the verbalize stage and \[1\] here"),
        ({"student": {"checkpoint": "ab", "path": "/x"}}, r"is None .* and 'ab' here \(None there, /x here\)"),
    ],
)
def test_predecessor_of_other_facts(stage, needs, message):
    write_record(stage, RECORD | {"state": "finished"})
    with pytest.raises(LineageError, match=message) as caught:
        require_predecessor(stage, "verbalize", needs)
    assert str(stage) in str(caught.value) and "run --stage verbalize again" in str(caught.value)


def test_predecessor_that_fits(stage):
    write_record(stage, RECORD | {"state": "finished"})
    found = require_predecessor(stage, "verbalize", {"student": {"layers": [1, 2], "path": "/elsewhere"}})
    assert found["state"] == "finished"


# ---- tokens ----


def swapped(tokenizer, first: str, second: str):
    """The same tokenizer with two ids exchanged."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = tree["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    copy = tiny.make_tokenizer("tiny")
    copy._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(tree))
    return copy


def test_equal_sizes_with_different_ids_are_refused():
    one = tiny.make_tokenizer("tiny")
    two = swapped(one, "a", "b")
    a, b = one.get_vocab()["a"], one.get_vocab()["b"]
    assert len(one) == len(two) and two.get_vocab()["a"] == b
    with pytest.raises(ConfigError) as caught:
        require_same_tokens(one, two, "models/small", "models/big")
    message = str(caught.value)
    assert "models/small" in message and "models/big" in message and "2 tokens different ids" in message
    assert f"'a': {a} and {b}" in message and f"'b': {b} and {a}" in message
    require_same_tokens(one, tiny.make_tokenizer("tiny"), "x", "y")


def test_a_token_that_one_lacks_is_named():
    one, two = tiny.make_tokenizer("tiny"), tiny.make_tokenizer("tiny")
    two.add_tokens(["<extra>"])
    with pytest.raises(ConfigError, match=f"'<extra>': None and {len(one)}"):
        require_same_tokens(one, two, "x", "y")


def test_tokenizer_digest_sees_ids_and_template():
    one, again = tiny.make_tokenizer("tiny"), tiny.make_tokenizer("tiny")
    assert tokenizer_digest(one) == tokenizer_digest(again)
    assert tokenizer_digest(swapped(one, "a", "b")) != tokenizer_digest(one)
    again.chat_template += " "
    assert tokenizer_digest(again) != tokenizer_digest(one)


# ---- checkpoints ----


def save(folder, change=None, **options):
    model = tiny.make_model(**options)
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder)
    return checkpoint_digest(folder)


def test_checkpoint_digest_follows_weights_not_folders(tmp_path):
    digest = save(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "moved" / "elsewhere")
    assert checkpoint_digest(tmp_path / "moved" / "elsewhere") == digest == save(tmp_path / "again")
    assert save(tmp_path / "seed", seed=1) != digest
    assert save(tmp_path / "shape", layers=3) != digest


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.language_model.layers.2.mlp.up_proj.weight", "model.visual.patch_embed.proj.weight"],
)
def test_checkpoint_digest_sees_every_part(tmp_path, name):
    """sft leaves the vision tower, which lies at the end of the file, as it was."""
    digest = save(tmp_path / "one")
    assert save(tmp_path / "two", lambda model: model.get_parameter(name).view(-1)[0].add_(1)) != digest


def test_checkpoint_digest_samples_large_files(tmp_path):
    """Beyond 4 MiB, blocks over the whole of it: training that changes some 100 KiB anywhere is seen."""
    from safetensors.torch import save_file

    def digest(change=None):
        weight = torch.zeros(64, 50_000)  # 12.8 MB in 64 rows
        if change is not None:
            weight[change] = 1
        save_file({"weight": weight}, tmp_path / "model.safetensors")
        return checkpoint_digest(tmp_path)

    (tmp_path / "config.json").write_text("{}")
    changes = (None, *range(0, 64, 9))
    assert len({digest(change) for change in changes}) == len(changes)


def test_checkpoint_digest_ignores_who_wrote_the_config(tmp_path):
    digest = save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "0", "_name_or_path": "x"}))
    assert checkpoint_digest(tmp_path) == digest
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_id": 1}))
    assert checkpoint_digest(tmp_path) != digest


@pytest.mark.parametrize("path", ["./nowhere", "nowhere", "a/b/c", "/nowhere/at/all"])
def test_missing_folder(path):
    with pytest.raises(FileNotFoundError, match=f"student.path: folder {path} does not exist; give a checkpoint"):
        resolve_folder(path, "student.path")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folder_without_a_model(tmp_path, missing):
    for name in {"config.json", "model.safetensors"} - {missing}:
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match="teacher.path: .* is no checkpoint: config.json or "):
        resolve_folder(str(tmp_path), "teacher.path")
    (tmp_path / missing).write_text("{}")
    assert resolve_folder(str(tmp_path), "teacher.path") == tmp_path


def test_unreachable_hub_name(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match="student.path: no folder, and some/model is not on this machine"):
        resolve_folder("some/model", "student.path")


@pytest.mark.parametrize("layers, outside", [([1, 5], [5]), ([0, 1], [0]), ([-1, 4, 9], [-1, 9])])
def test_target_layers_out_of_range(layers, outside):
    settings = BackboneConfig(path="models/small", layers=layers)
    with pytest.raises(ConfigError) as caught:
        target_layers(settings, tiny.make_model(layers=4).config, "student")
    assert f"student.layers: {outside} out of range; models/small has 4 decoder layers" in str(caught.value)
    assert "1 .. 4" in str(caught.value)


@pytest.mark.parametrize(
    "depth, wanted", [(28, [2, 6, 10, 14, 18, 22, 26]), (80, list(range(2, 79, 4))), (4, [2]), (2, [1]), (1, [1])]
)
def test_default_target_layers_are_the_papers(depth, wanted):
    text = type("Text", (), {"num_hidden_layers": depth})
    config = type("Config", (), {"get_text_config": staticmethod(lambda: text)})
    assert target_layers(BackboneConfig(path="x"), config, "student") == wanted
    assert target_layers(BackboneConfig(path="x", layers=[depth]), config, "student") == [depth]


# ---- verbalizers ----


@pytest.fixture
def make_role(workspace, tmp_path):
    """make_role(name, section={..}) -> Role whose verbalizers are expected under tmp_path/run."""

    def make_role(name="student", **sections):
        tree = runs.settings(workspace, tmp_path / "run")
        for section, value in sections.items():
            tree[section] = tree.get(section, {}) | value
        return Role(name, load_config(runs.write_config(tree, tmp_path / "config.yaml")))

    return make_role


def test_verbalizers_that_fit_are_loaded_frozen(make_role):
    role = make_role()
    made = Verbalizers(role.spec())
    made.save_pretrained(role.verbalizer_folder())
    role.require_verbalizers()
    loaded = role.trained_verbalizers()
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, weight in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"verbalizer": {"architecture": "mlp"}}, "student.verbalizer is {.*'mlp'.* and {.*'verb_ffn'.* here"),
        ({"student": {"layers": [1, 2]}}, r"student.layers is \[1, 2\] in .* and \[1, 2, 3\] here"),
        ({"verbalizer": {"norm": True}}, ".*'norm': True.* 'norm': False.* here"),
        ({"verbalizer": {"residual": True}}, ".*'residual': True.* 'residual': False.* here"),
    ],
)
def test_verbalizers_that_do_not_fit(make_role, other, message):
    made_for = make_role(**other)
    Verbalizers(made_for.spec()).save_pretrained(made_for.verbalizer_folder())
    with pytest.raises(LineageError, match=f"does not fit this run: {message}; run --stage verbalize again"):
        make_role().require_verbalizers()


def test_verbalizers_of_another_backbone(make_role, tmp_path):
    teacher = make_role("teacher", teacher={"layers": [1, 2, 3]})
    Verbalizers(teacher.spec()).save_pretrained(tmp_path / "theirs")
    student = make_role(student={"verbalizers": str(tmp_path / "theirs")})
    with pytest.raises(LineageError, match=r"student.checkpoint is .* \(.*teacher there, .*student here\)"):
        student.require_verbalizers()


def test_no_verbalizers(make_role):
    with pytest.raises(LineageError, match="holds no verbalizers; run --stage verbalize first"):
        make_role().require_verbalizers()
