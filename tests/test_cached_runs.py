"""Stage interact from a teacher on disk: what it learns is what it learns from a teacher in the job."""

import json
import shutil

import pytest
import tiny
import tiny_runs as runs
import torch
from safetensors.torch import load_file, save_file

from vlsi_fast import load_config, run
from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError
from vlsi_fast.lineage import LineageError, read_record
from vlsi_fast.planner.checks.command import PreflightError
from vlsi_fast.teacher_cache import build as building
from vlsi_fast.teacher_cache.build import Chosen, build
from vlsi_fast.teacher_cache.checking import check
from vlsi_fast.teacher_cache.manifest import read_manifest
from vlsi_fast.teacher_cache.store import CacheError, CacheReader, shards_of
from vlsi_fast.teacher_cache.verifying import merge, problems_of

QUIET = {"progress": False}


def tree_of(workspace, verbalized, output, cache=None, **sections):
    """Sampled matches; verbalizers that are trained already."""
    tree = runs.settings(workspace, output, save_steps=2, save_total_limit=None) | {"matching": {}}
    tree["data"]["train"][0]["limit"] = 24
    for role in ("student", "teacher"):
        tree[role]["verbalizers"] = str(verbalized / "verbalize" / role)
    if cache is not None:
        tree["teacher"] |= {"mode": "cached", "cache": str(cache)}
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return tree


def config_of(*args, **sections):
    tree = tree_of(*args, **sections)
    return load_config(runs.write_config(tree, args[2].parent / f"{args[2].name}.yaml"))


def records(output, names=("loss", "kl", "matches", "loss/last", "rows", "answer_tokens")):
    return [[record.get(name) for name in names] for record in runs.metrics(output, "interact")]


def student(output):
    return load_file(output / "interact" / "student" / "model.safetensors")


def assert_same(one, other):
    """Two runs of stage interact, to the last bit."""
    assert records(one) == records(other)
    for name, value in student(one).items():
        assert torch.equal(value, student(other)[name]), name


@pytest.fixture(scope="module")
def folder(workspace, tmp_path_factory):
    """`verbalized`: a finished stage verbalize. `live`: interact with the teacher in the job. `exact`, `hidden`: its
    caches."""
    folder = tmp_path_factory.mktemp("cached")
    tree = runs.settings(workspace, folder / "verbalized", max_steps=4)
    run(load_config(runs.write_config(tree, folder / "verbalized.yaml")), "verbalize")
    live = config_of(workspace, folder / "verbalized", folder / "live")
    run(live, "interact")
    build(live, Chosen(folder / "exact", numbers="float32", **QUIET))
    build(live, Chosen(folder / "hidden", form="hidden", **QUIET))
    return folder


@pytest.fixture
def cached(workspace, folder, tmp_path):
    def make(name="run", cache="exact", **sections):
        return config_of(workspace, folder / "verbalized", tmp_path / name, folder / cache, **sections)

    return make


# ---- the same run ----


@pytest.mark.parametrize("cache", ["exact", "hidden"])
def test_to_the_last_bit(folder, cached, tmp_path, cache):
    """Losses, the KL of every pair, sampled matches and the student that comes out."""
    run(cached(cache=cache), "interact")
    assert_same(folder / "live", tmp_path / "run")
    ours, theirs = (read_record(f / "interact") for f in (tmp_path / "run", folder / "live"))
    assert ours["identity"] == theirs["identity"], "one run, wherever the teacher was"


def test_balanced_micro_batches(workspace, folder, cached, tmp_path):
    """Dealt by what they cost, which is less without a teacher: with matches that need no KL, the same losses."""
    training = runs.settings(workspace, tmp_path)["training"] | {"balance_batch": True}
    sections = {"training": training, "matching": {"strategy": "uniform"}}
    run(config_of(workspace, folder / "verbalized", tmp_path / "live", **sections), "interact")
    run(cached(**sections), "interact")
    for found, wanted in zip(runs.losses(tmp_path / "run", "interact"), runs.losses(tmp_path / "live", "interact")):
        assert found == pytest.approx(wanted, rel=2e-6)


def test_workers_and_packed_rows(workspace, folder, cached, tmp_path):
    """Rows that other processes read; rows end to end, which the teacher saw padded."""
    run(cached("workers", data={"num_workers": 2, **tree_data(workspace)}), "interact")
    assert_same(folder / "live", tmp_path / "workers")
    run(cached("packed", data={"padding_free": True, **tree_data(workspace)}), "interact")
    for found, wanted in zip(runs.losses(tmp_path / "packed", "interact"), runs.losses(folder / "live", "interact")):
        assert found == pytest.approx(wanted, rel=2e-5)


def tree_data(workspace):
    return {"train": [{"reader": "messages", "path": str(workspace / "rows.jsonl"), "limit": 24}]}


@pytest.mark.parametrize("changes", [{"seed": 7}, {"training": {"per_device_train_batch_size": 3}}], ids=str)
def test_rows_are_found_in_any_order_and_batch(workspace, folder, cached, tmp_path, changes):
    """Another order and other micro-batches read the same targets; the live run of the same options is the truth."""
    build(cached(), Chosen(tmp_path / "all", numbers="float32", rows=24, **QUIET))
    training = runs.settings(workspace, tmp_path)["training"] | {"max_steps": 2} | changes.get("training", {})
    changes = changes | {"training": training}
    live = config_of(workspace, folder / "verbalized", tmp_path / "there", **changes)
    here = config_of(workspace, folder / "verbalized", tmp_path / "here", tmp_path / "all", **changes)
    run(live, "interact"), run(here, "interact")
    for found, wanted in zip(records(tmp_path / "here"), records(tmp_path / "there"), strict=True):
        assert found[2] == wanted[2] and found[3:] == [pytest.approx(v, rel=2e-5) for v in wanted[3:]]
        torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(wanted[1]), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("numbers", ["float16", "bfloat16", "int8"])
def test_rounded_targets_stay_near(folder, cached, tmp_path, numbers):
    """Bars from measurement, as the manifest and `teacher check` have it; and such a run is another run."""
    config = cached()
    manifest = build(config, Chosen(tmp_path / numbers, numbers=numbers, **QUIET))
    run(cached(teacher={"cache": str(tmp_path / numbers)}), "interact")
    bar = {"float16": 1e-5, "bfloat16": 1e-4, "int8": 2e-3}[numbers]
    found, wanted = runs.losses(tmp_path / "run", "interact"), runs.losses(folder / "live", "interact")
    assert found != wanted and found == pytest.approx(wanted, rel=bar)
    assert 0 < manifest["errors"]["kl_mean"] < manifest["errors"]["kl_max"] < 0.05
    assert 0 < manifest["errors"]["gradient"] < 0.02
    record = read_record(tmp_path / "run" / "interact")
    assert record["facts"]["teacher"]["targets"] == numbers
    with pytest.raises(LineageError, match="another run"):
        run(cached(), "interact", resume=True)


def test_a_killed_run_goes_on_from_the_cache_or_from_the_teacher(workspace, folder, cached, tmp_path):
    """From checkpoint 2: a run from the cache, and one that was begun with the teacher in the job."""
    for name, begun in (("run", cached()), ("begun_live", None)):
        if begun is None:
            begun = config_of(workspace, folder / "verbalized", tmp_path / name)
        run(begun, "interact")
        runs.rewind(tmp_path / name / "interact", 2)
        run(cached(name), "interact", resume=True)
        assert_same(folder / "live", tmp_path / name)


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "jsd"},
        {"intermediate": "l2"},
        {"intermediate": "none", "last": "l2"},
        {"intermediate": "ce"},
        {"last": "ce"},
        {"intermediate": "none"},
        {"temperature": 2.0},
        {"last": "none"},
    ],
    ids=str,
)
def test_every_loss_of_table_4d(workspace, folder, cached, tmp_path, settings):
    """By hidden states all of them, by targets those that need no more, and the others say so at load."""
    run(config_of(workspace, folder / "verbalized", tmp_path / "live", interact=settings), "interact")
    run(cached(cache="hidden", interact=settings), "interact")
    assert_same(tmp_path / "live", tmp_path / "run")
    if settings in ({"intermediate": "ce"}, {"last": "ce"}, {"intermediate": "none"}, {"last": "none"}):
        run(cached("targets", interact=settings), "interact")
        assert_same(tmp_path / "live", tmp_path / "targets")
    else:
        with pytest.raises(ConfigError, match=r"--form hidden|interact\.temperature: 1\.0 in the cache, 2\.0"):
            run(cached("targets", interact=settings), "interact")


@pytest.mark.parametrize("strategy", ["random", "uniform", "bottom"])
def test_every_matching_of_table_4e(workspace, folder, cached, tmp_path, strategy):
    matching = {"strategy": strategy} | ({"k": 3} if strategy == "bottom" else {})
    run(config_of(workspace, folder / "verbalized", tmp_path / "live", matching=matching), "interact")
    run(cached(matching=matching), "interact")
    assert_same(tmp_path / "live", tmp_path / "run")


def test_some_of_the_layers(workspace, folder, cached, tmp_path):
    """A run that names fewer layers than the cache has, and a cache that was built of fewer."""
    layers = [2, 4, 5]
    live = config_of(workspace, folder / "verbalized", tmp_path / "live")
    built = build(live, Chosen(tmp_path / "few", numbers="float32", layers=layers, **QUIET))
    assert built["identity"]["layers"] == layers
    run(cached("few", teacher={"cache": str(tmp_path / "few"), "layers": layers}), "interact")
    run(cached("some", teacher={"layers": layers}), "interact")
    assert_same(tmp_path / "few", tmp_path / "some")
    assert runs.metrics(tmp_path / "some", "interact")[0]["teacher_layers"] == layers
    first, all_layers = (runs.metrics(f, "interact")[0]["kl"] for f in (tmp_path / "some", folder / "live"))
    assert first == [[row[k - 1] for k in layers] for row in all_layers]
    with pytest.raises(ConfigError, match=r"has teacher layers \[2, 4, 5\], this run needs \[1, 2, 3, 4, 5\]"):
        run(cached("all", teacher={"cache": str(tmp_path / "few")}), "interact")
    with pytest.raises(ConfigError, match=r"--layers \[9\]"):
        build(live, Chosen(tmp_path / "none", layers=[2, 9], **QUIET))


def test_evaluation_reads_the_cache_as_well(workspace, folder, cached, tmp_path):
    """Rows of data.eval; without them an error that names what adds them."""
    rows = {"eval": [{"reader": "messages", "path": str(workspace / "rows.jsonl"), "limit": 30}]} | tree_data(workspace)
    training = runs.settings(workspace, tmp_path)["training"] | {"eval_steps": 2, "max_eval_samples": 10}
    sections = {"data": rows, "training": training}
    live = config_of(workspace, folder / "verbalized", tmp_path / "live", **sections)
    run(live, "interact")
    shutil.copytree(folder / "exact", tmp_path / "exact")
    here = cached(teacher={"cache": str(tmp_path / "exact")}, **sections)
    with pytest.raises(CacheError, match="teacher build"):
        run(here, "interact")
    shutil.rmtree(tmp_path / "run")
    build(here, Chosen(numbers="float32", split="eval", **QUIET))
    run(here, "interact")
    lines = [(tmp_path / name / "interact" / "eval.jsonl").read_text().splitlines() for name in ("live", "run")]
    found, wanted = ([{k: v for k, v in json.loads(x).items() if k != "runtime"} for x in each] for each in lines)
    assert len(found) == 2
    for one, other in zip(found, wanted, strict=True):
        assert one == {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in other.items()}


# ---- without the teacher ----


def test_the_teacher_need_not_be_there(workspace, folder, cached, tmp_path):
    """Its folder and verbalizers gone, its name that of a repository: nothing is looked up, and the run is the same."""
    tree = tree_of(workspace, folder / "verbalized", tmp_path / "run", folder / "exact")
    tree["teacher"] = {"path": "somebody/a-teacher", "mode": "cached", "cache": str(folder / "exact")}
    run(load_config(runs.write_config(tree, tmp_path / "run.yaml")), "interact")
    assert_same(folder / "live", tmp_path / "run")


def test_a_whole_run_without_the_teacher(workspace, folder, tmp_path):
    """All three stages, verbalizers of the student alone; then the tools that look at a run."""
    tree = tree_of(
        workspace, folder / "verbalized", tmp_path / "run", folder / "exact", verbalize={"models": ["student"]}
    )
    tree["teacher"] = {"path": "somebody/a-teacher", "mode": "cached", "cache": str(folder / "exact")}
    del tree["student"]["verbalizers"]
    config = runs.write_config(tree, tmp_path / "run.yaml")
    build(
        load_config(
            config,
            {
                "teacher.path": str(workspace / "teacher"),
                "teacher.mode": "auto",
                "teacher.layers": [1, 2, 3, 4, 5],
                "teacher.verbalizers": str(folder / "verbalized/verbalize/teacher"),
            },
        ),
        Chosen(tmp_path / "all", numbers="float32", rows=24, **QUIET),
    )
    run(load_config(config, {"teacher.cache": str(tmp_path / "all")}), "all")
    assert all(read_record(tmp_path / "run" / stage)["state"] == "finished" for stage in ("interact", "sft"))
    assert main(["report", str(tmp_path / "run")]) == 0 and main(["inspect", str(tmp_path / "run")]) == 0


def change_weights(path):
    """Another model of the same shape."""
    state = load_file(path)
    name = next(n for n in sorted(state) if state[n].dim() == 2 and "embed_tokens" in n)
    save_file(state | {name: state[name] + 1}, path, {"format": "pt"})


def other_teacher(workspace, folder, tmp_path):
    shutil.copytree(workspace / "teacher", tmp_path / "teacher")
    change_weights(tmp_path / "teacher" / "model.safetensors")
    return {"teacher": {"path": str(tmp_path / "teacher")}}


def other_head(workspace, folder, tmp_path):
    shutil.copytree(workspace / "student", tmp_path / "student")
    change_weights(tmp_path / "student" / "model.safetensors")
    tree = runs.settings(workspace, tmp_path / "v", max_steps=1) | {"verbalize": {"models": ["student"]}}
    tree["student"]["path"] = str(tmp_path / "student")
    run(load_config(runs.write_config(tree, tmp_path / "v.yaml")), "verbalize")
    return {
        "student": {"path": str(tmp_path / "student"), "verbalizers": str(tmp_path / "v" / "verbalize" / "student")}
    }


def other_verbalizers(workspace, folder, tmp_path):
    tree = runs.settings(workspace, tmp_path / "v", max_steps=1) | {"verbalize": {"models": ["teacher"]}}
    run(load_config(runs.write_config(tree, tmp_path / "v.yaml")), "verbalize")
    return {"teacher": {"verbalizers": str(tmp_path / "v" / "verbalize" / "teacher")}}


REFUSED = {
    "teacher": (other_teacher, r"the teacher's weights: \w{12} in the cache, \w{12} in this run"),
    "head": (other_head, r"the student's language head: \w{12} in the cache, \w{12} in this run"),
    "verbalizers": (other_verbalizers, r"the teacher's verbalizers: \w{12} in the cache, \w{12} in this run"),
    "temperature": ({"interact": {"temperature": 2.0}}, "interact.temperature: 1.0 in the cache, 2.0 in this run"),
    "length": ({"data": {"max_length": 99}}, "data.max_length: 2048 in the cache, 99 in this run"),
    "pixels": ({"teacher": {"max_pixels": 4096}}, "teacher.max_pixels: none in the cache, 4096 in this run"),
    "dtype": ({"dtype": "bfloat16"}, "dtype: float32 in the cache, bfloat16 in this run"),
    "headless": (
        {"interact": {"headless": True, "intermediate": "l2", "last": "kld"}},
        "headless compares .* teacher.mode to auto",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_cache_of_something_else_is_refused(workspace, folder, cached, tmp_path, what):
    """Before any weight is loaded; the message names both sides."""
    changes, message = REFUSED[what]
    changes = changes if isinstance(changes, dict) else changes(workspace, folder, tmp_path)
    if "data" in changes:
        changes["data"] = tree_data(workspace) | changes["data"]
    with pytest.raises(ConfigError, match=message):
        run(cached(**changes), "interact")
    assert not (tmp_path / "run" / "interact").exists()


def test_no_cache_or_an_empty_one(workspace, cached, tmp_path):
    with pytest.raises(ConfigError, match="holds no cache of a teacher.*teacher build --config"):
        run(cached(teacher={"cache": str(tmp_path / "nothing")}), "interact")
    config = cached(teacher={"cache": str(tmp_path / "begun")})
    build(config, Chosen(numbers="float32", rows=1, **QUIET))
    shutil.rmtree(tmp_path / "begun" / "shards")
    with pytest.raises(CacheError, match="has no rows yet"):
        run(config, "interact")


def test_a_row_that_is_not_in_the_cache(workspace, folder, cached, tmp_path):
    """Said before the stage starts, where the sample of rows has it; else where it is used, not where it is read."""
    few = config_of(workspace, folder / "verbalized", tmp_path / "run", tmp_path / "few")
    build(few, Chosen(numbers="float32", rows=8, **QUIET))
    with pytest.raises(PreflightError, match=r"rows.jsonl#\d+"):
        run(few, "interact")
    few = config_of(workspace, folder / "verbalized", tmp_path / "run", tmp_path / "few", preflight=False)
    with pytest.raises(CacheError, match=r"row rows.jsonl#\d+ is not in .*few, which has 8 rows.*teacher build"):
        run(few, "interact")
    assert len(runs.metrics(tmp_path / "run", "interact")) == 2, "both steps whose rows are there were made"


# ---- building ----


class Cut(Exception):
    pass


def test_an_interrupted_build_goes_on(folder, cached, tmp_path, monkeypatch):
    """Killed after three micro-batches, with small shards: what was written stays, the rest is added, no row twice."""
    config = cached(teacher={"cache": str(tmp_path / "cache")})
    call, made = building.TeacherStage.load_speaking_teacher, []

    def dying(stage, head):
        teacher = call(stage, head)
        forward = teacher.forward

        def count(*args):
            made.append(1)
            if len(made) == 4:
                raise Cut
            return forward(*args)

        teacher.forward = count
        return teacher

    monkeypatch.setattr(building.TeacherStage, "load_speaking_teacher", dying)
    chosen = {"numbers": "float32", "shard_bytes": 1, **QUIET}
    with pytest.raises(Cut):
        build(config, Chosen(**chosen))
    before = shards_of(tmp_path / "cache")
    assert len(before) == 6 and read_manifest(tmp_path / "cache").get("counts") is None
    build(config, Chosen(**chosen))
    assert len(made) == 4 + 3, "only the micro-batches that were not done"
    after = shards_of(tmp_path / "cache")
    assert before.items() <= after.items() and sum(line["rows"] for line in after.values()) == 12
    build(config, Chosen(**chosen))
    assert shards_of(tmp_path / "cache") == after and len(made) == 7, "a third call finds nothing to do"
    monkeypatch.undo()
    run(config, "interact")
    assert_same(folder / "live", tmp_path / "run")


def test_halves_merge(workspace, folder, cached, tmp_path):
    """Two builds on two machines, of a source each; and one by rows. Of other things, they do not."""
    lines = (workspace / "rows.jsonl").read_text().splitlines()[:24]
    for name, part in (("a", lines[:11]), ("b", lines[11:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    image_root = str(workspace)
    train = [{"reader": "messages", "path": str(tmp_path / f"{n}.jsonl"), "image_root": image_root} for n in "ab"]
    halves = config_of(workspace, folder / "verbalized", tmp_path / "halves", data={"train": train})
    for name in "ab":
        build(halves, Chosen(tmp_path / name, numbers="float32", source=f"{name}.jsonl", **QUIET))
    manifest = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "whole")
    assert manifest["counts"]["rows"] == 24 and [len(CacheReader(tmp_path / n)) for n in "ab"] == [11, 13]
    assert not list(problems_of(tmp_path / "whole"))
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "whole")["counts"] == manifest["counts"]
    run(cached(teacher={"cache": str(tmp_path / "whole")}), "interact")
    for found, wanted in zip(runs.losses(tmp_path / "run", "interact"), runs.losses(folder / "live", "interact")):
        assert found == pytest.approx(wanted, rel=2e-6)
    with pytest.raises(ConfigError, match=r"form: targets in the cache, hidden in"):
        merge([folder / "hidden", tmp_path / "a"], tmp_path / "mixed")
    with pytest.raises(ConfigError, match="--source c: data.train has a.jsonl, b.jsonl"):
        build(halves, Chosen(tmp_path / "c", source="c", **QUIET))


def test_rows_that_the_teacher_cannot_use(workspace, folder, tmp_path):
    """A row too long for the teacher alone is skipped from the cache as it is with the teacher in the job."""
    lines = [json.loads(line) for line in (workspace / "rows.jsonl").read_text().splitlines()[:12]]
    lines[4]["messages"][1]["content"] = ""
    lines[7]["images"] = ["images/gone.png"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    source = {"reader": "messages", "path": str(tmp_path / "rows.jsonl"), "image_root": str(workspace)}
    data = {"train": [source], "max_skipped_share": 1.0}
    verbalized = folder / "verbalized"
    live = config_of(workspace, verbalized, tmp_path / "live", data=data)
    cached = config_of(workspace, verbalized, tmp_path / "run", tmp_path / "cache", data=data)
    counts = build(cached, Chosen(numbers="float32", **QUIET))["counts"]
    assert counts["rows"] == 10 and counts["refused"] == 1, "an image that is gone has no key"
    run(live, "interact"), run(cached, "interact")
    assert_same(tmp_path / "live", tmp_path / "run")
    skipped = [(tmp_path / n / "interact" / "skipped_rows.jsonl").read_text() for n in ("live", "run")]
    causes = [sorted(json.loads(line)["cause"] for line in each.splitlines()) for each in skipped]
    assert causes[0] == causes[1] == ["empty_answer", "missing_image"]


def test_the_command(workspace, folder, tmp_path, capsys):
    """build, check, verify, merge as they are typed; exit codes; what is printed names the next step."""
    config = runs.write_config(tree_of(workspace, folder / "verbalized", tmp_path / "run"), tmp_path / "run.yaml")
    cache = tmp_path / "run" / "teacher_cache"
    assert main(["teacher", "build", "--config", str(config)]) == 0
    told = capsys.readouterr().out
    assert "12 rows" in told and "rounding costs" in told and f"--teacher.mode cached --teacher.cache {cache}" in told
    assert main(["teacher", "check", "--config", str(config), "--rows", "3"]) == 0
    assert "3 rows" in (told := capsys.readouterr().out) and "passed" in told
    assert main(["teacher", "verify", str(cache)]) == 0
    assert main(["teacher", "merge", str(cache), "--out", str(tmp_path / "m"), "--json"]) == 0
    (shard,) = (cache / "shards").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.unlink()  # merged caches share files
    shard.write_bytes(content)
    assert main(["teacher", "verify", "--quick", str(cache)]) == 0
    capsys.readouterr()
    assert main(["teacher", "verify", str(cache)]) == 1
    assert "is not what was written (checksum)" in capsys.readouterr().out
    shard.unlink()
    assert main(["teacher", "verify", str(cache)]) == 1 and main(["teacher", "build", "--config", str(config)]) == 0
    assert main(["teacher", "verify", str(cache)]) == 0, "the rows of a lost shard are made again"
    assert main(["teacher", "build", "--config", str(config), "--form", "hidden", "--numbers", "int8"]) == 2
    assert main(["teacher", "build", "--config", str(config), "--form", "hidden"]) == 2
    assert "form: targets in the cache, hidden in this call" in capsys.readouterr().err
    assert main(["teacher", "verify", str(tmp_path)]) == 2


def test_check_finds_a_cache_of_another_teacher(workspace, folder, cached, tmp_path):
    """Numbers that are wrong although all digests fit; and a teacher that is its own student."""
    shutil.copytree(folder / "exact", tmp_path / "wrong")
    config = cached(teacher={"cache": str(tmp_path / "wrong")})
    found = check(config, 4)
    assert found["passed"] and found["kl"] < 1e-5 and found["self_kl"] is None
    for shard in (tmp_path / "wrong" / "shards").glob("*.safetensors"):
        state = load_file(shard)
        state["expectation"] = state["expectation"].flip(0)
        save_file(state, shard, {"refused": "[]"})
    assert not check(config, 4)["passed"]


def test_a_teacher_is_level_with_itself(workspace, folder, tmp_path):
    """KL(teacher || teacher) out of the cache is 0: student and teacher are one model."""
    tree = tree_of(workspace, folder / "verbalized", tmp_path / "run")
    tree["student"] = dict(tree["teacher"])
    config = load_config(runs.write_config(tree, tmp_path / "run.yaml"))
    build(config, Chosen(numbers="float32", **QUIET))
    found = check(config, 4)
    assert found["passed"] and found["self_kl"] < 1e-5


# ---- several teachers ----


@pytest.fixture(scope="module")
def teachers(workspace, folder, tmp_path_factory):
    """Two sources; `one` and `two`: caches of the rows of each, by one teacher; `small`: of the second, by another."""
    place = tmp_path_factory.mktemp("teachers")
    lines = (workspace / "rows.jsonl").read_text().splitlines()[:24]
    for name, part in (("a", lines[:12]), ("b", lines[12:])):
        (place / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    processor = tiny.make_processor("tiny", patch_size=8, min_pixels=1024, max_pixels=1024)
    model = tiny.make_model(tokenizer=processor.tokenizer, patch_size=8, hidden=40, layers=4, seed=9)
    model.save_pretrained(place / "small"), processor.save_pretrained(place / "small")
    data = {"train": [source_of(workspace, place, name) for name in "ab"]}
    config = config_of(workspace, folder / "verbalized", place / "main", data=data)
    for source, name in (("a", "one"), ("b", "two")):
        build(config, Chosen(place / name, numbers="float32", source=f"{source}.jsonl", **QUIET))
    build(config, Chosen(place / "both", numbers="float32", rows=24, **QUIET))
    tree = tree_of(workspace, folder / "verbalized", place / "other", data=data) | {
        "verbalize": {"models": ["teacher"]}
    }
    tree["teacher"] = {"path": str(place / "small"), "layers": [1, 2, 3]}
    other = load_config(runs.write_config(tree, place / "other.yaml"))
    run(other, "verbalize")
    build(other, Chosen(place / "small_cache", numbers="float32", source="b.jsonl", **QUIET))
    return place


def source_of(workspace, place, name, **fields):
    return {"reader": "messages", "path": str(place / f"{name}.jsonl"), "image_root": str(workspace)} | fields


def taught_by(workspace, folder, teachers, output, main, second=None, **sections):
    """A run whose second source may have a cache of its own."""
    fields = {} if second is None else {"teacher": str(teachers / second)}
    data = {"train": [source_of(workspace, teachers, "a"), source_of(workspace, teachers, "b", **fields)]}
    sections = {"matching": {"strategy": "uniform"}} | sections
    return config_of(workspace, folder / "verbalized", output, teachers / main, data=data, **sections)


def test_two_caches_of_one_teacher_are_one(workspace, folder, teachers, tmp_path):
    """With matches that need no KL the rows' losses do not depend on which of them are matched together."""
    run(taught_by(workspace, folder, teachers, tmp_path / "whole", "both"), "interact")
    run(taught_by(workspace, folder, teachers, tmp_path / "halves", "one", "two"), "interact")
    whole, halves = (runs.metrics(tmp_path / name, "interact") for name in ("whole", "halves"))
    for one, other in zip(whole, halves, strict=True):
        for name in [n for n in one if n.startswith("loss")]:
            assert other[name] == pytest.approx(one[name], rel=2e-6), name
        tokens = other["teacher_tokens"]
        assert sum(tokens.values()) == one["answer_tokens"] and min(tokens.values()) > 0
        mean = torch.zeros(3, 5)
        for i, name in enumerate(("one", "two")):
            mean += torch.tensor(other["kl"])[:, 5 * i : 5 * i + 5] * tokens[name] / one["answer_tokens"]
        torch.testing.assert_close(mean, torch.tensor(one["kl"]), rtol=2e-5, atol=1e-6)


def test_teachers_of_different_depth(workspace, folder, teachers, tmp_path):
    """Each teacher's matches are among its own layers; a source without rows in a micro-batch takes no part."""
    config = taught_by(workspace, folder, teachers, tmp_path / "run", "one", "small_cache", matching={})
    run(config, "interact")
    for record in runs.metrics(tmp_path / "run", "interact"):
        assert record["teacher_layers"] == [1, 2, 3, 4, 5, 1, 2, 3]
        assert record["teachers"] == ["one"] * 5 + ["small_cache"] * 3
        for row in record["matches"]:
            assert sum(row[:5]) <= 2 and sum(row[5:]) <= 2  # two micro-batches a step
    assert main(["report", str(tmp_path / "run")]) == 0
    state = read_record(tmp_path / "run" / "interact")
    assert state["identity"]["inputs"].keys() == {
        "student_verbalizers",
        "teacher_verbalizers",
        "teacher_2",
    }


def test_a_source_with_a_teacher_needs_caches(workspace, folder, teachers, tmp_path):
    with pytest.raises(ConfigError, match=r"data.train.1.teacher names a cache, and teacher.mode is auto"):
        run(
            taught_by(workspace, folder, teachers, tmp_path / "run", "one", "two", teacher={"mode": "auto"}), "interact"
        )


# ---- two ranks ----


@pytest.mark.slow
def test_two_zero3_ranks(workspace, folder, teachers, tmp_path):
    """A build and runs on two ranks under ZeRO-3: one teacher to the last bit, two teachers without a deadlock."""
    training = runs.settings(workspace, tmp_path)["training"] | {
        "deepspeed": runs.zero3(),
        "gradient_accumulation_steps": 1,
    }
    jobs = []
    for name, cache in (("live", None), ("here", tmp_path / "cache")):
        tree = tree_of(workspace, folder / "verbalized", tmp_path / name, cache, training=training)
        config = runs.write_config(tree, tmp_path / f"{name}.yaml")
        jobs += [("interact", config)] if cache is None else [("build", config), ("interact", config)]
    tree = tree_of(workspace, folder / "verbalized", tmp_path / "offload", training=training)
    tree["teacher"] |= {"mode": "offload", "cache": str(tmp_path / "offloaded")}
    jobs.append(("build", runs.write_config(tree, tmp_path / "offload.yaml")))
    taught_by(workspace, folder, teachers, tmp_path / "many", "one", "small_cache", training=training)
    jobs.append(("interact", tmp_path / "many.yaml"))
    runs.train_several("--fresh", *jobs, launcher="torchrun")
    assert_same(tmp_path / "live", tmp_path / "here")
    one, other = (CacheReader(tmp_path / name) for name in ("cache", "offloaded"))
    shards = [load_file(tmp_path / "cache" / "shards" / name) for name in shards_of(tmp_path / "cache")]
    for key in (bytes(key) for shard in shards for key in shard["keys"].tolist()):
        for name, value in one.read(one.find(key)).items():
            assert torch.equal(value, other.read(other.find(key))[name]), "however the teacher is held"
    assert len({name.split("-")[0] for name in shards_of(tmp_path / "cache")}) == 2, "each rank its own"
    run(taught_by(workspace, folder, teachers, tmp_path / "alone", "one", "small_cache"), "interact")
    for found, wanted in zip(runs.losses(tmp_path / "many", "interact"), runs.losses(tmp_path / "alone", "interact")):
        assert found == pytest.approx(wanted, rel=1e-4)
