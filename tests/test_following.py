"""A teacher that runs ahead of a run that learns from it, in a process of its own."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import tiny_runs as runs
from following_jobs import Job, kill_all, until

from vlsi_fast import load_config, run
from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError
from vlsi_fast.data.sources import build_source
from vlsi_fast.stages.sampling import Placed, StepBatches, data_order
from vlsi_fast.teacher_cache.following import FollowedRows, LiveReader, data_digest, order_digest
from vlsi_fast.teacher_cache.pulse import Pulse, Silence, read_facts
from vlsi_fast.teacher_cache.store import CacheError, numbers_in, shards_of
from vlsi_fast.teacher_cache.students import Students

AHEAD, STEPS, STEP_ROWS, ROWS = 12, 15, 4, 40
"""Stage verbalize reads 12 rows of the order, interact the next 60 of it, so many twice."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models and rows, and runs that learn from the teacher itself (`live`) and from a whole cache."""
    folder = tmp_path_factory.mktemp("following")
    runs.make_models(folder)
    runs.make_rows(folder, ROWS)
    live = configured(folder, "live")
    run(load_config(live), "verbalize")
    run(load_config(live), "interact")
    cached = configured(folder, "cached", teacher={"mode": "cached", "cache": str(folder / "whole")})
    assert main(["teacher", "build", "--config", str(cached), "--numbers", "float32", "--json"]) == 0
    run(load_config(cached), "interact")
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    kill_all()


def configured(folder, name, teacher=None, **training):
    tree = runs.settings(folder, folder / name, **({"save_steps": 3, "max_steps": STEPS} | training))
    tree["interact"] = {"training": {"max_steps": training.get("max_steps", STEPS)}}
    tree["verbalize"] = {"training": {"max_steps": 3}}
    tree["teacher"] |= teacher or {}
    if name != "live":
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(folder / "live" / "verbalize", folder / name / "verbalize")
    return runs.write_config(tree, folder / f"{name}.json")


def following(folder, name, timeout=120, cache=None, **training):
    """The config of a run that follows, with a cache of its own."""
    cache = folder / (cache or f"{name}_cache")
    teacher = {"mode": "cached", "cache": str(cache), "cache_follow": True, "cache_timeout": timeout}
    return configured(folder, name, teacher, **training), cache


def builder(config, *words, ahead=AHEAD):
    command = ["teacher", "build", "--config", str(config), "--follow", "--ahead", str(ahead), "--json"]
    return Job("tool", [*command, "--numbers", "float32", *words], config.with_suffix(".builder"))


def student(config, *words):
    return Job("train", ["--stage", "interact", "--config", str(config), *words], config.with_suffix(".student"))


def told(cache, name="builder.json"):
    return read_facts(cache / name) or {}


def order_of(config):
    """Numbers of the rows that interact reads, one after another."""
    loaded = load_config(config)
    order = data_order(loaded, build_source(loaded.data.train), 12)
    return list(order.order.rows(order.start, STEPS * STEP_ROWS))


def expected(folder):
    """Losses of the run that has the teacher in its job; those of the whole cache are the same in the first epoch."""
    live, cached = (runs.losses(folder / name, "interact") for name in ("live", "cached"))
    assert len(live) == STEPS and live[:7] == cached[:7]
    return live


# ---- two processes ----


def test_losses_are_those_of_a_teacher_in_the_job_and_the_disk_holds_little(place):
    config, cache = following(place, "beside")
    tree = json.loads(config.read_text())
    tree["data"]["num_workers"] = 1  # rows are waited for where they are read ahead
    runs.write_config(tree, config)
    teacher, learner = builder(config), student(config)
    assert learner.end() == 0, learner.said.read_text()
    assert teacher.end() == 0, teacher.said.read_text()
    assert runs.losses(place / "beside", "interact") == expected(place)
    facts = told(cache)
    assert facts["state"] == "finished" and facts["position"] == STEPS * STEP_ROWS
    assert STEP_ROWS <= facts["most_ahead"] <= AHEAD
    rows = shards_of(place / "whole").values()
    a_row = sum(line["bytes"] for line in rows) / sum(line["rows"] for line in rows)
    # ahead, since the last checkpoint, and one that was just made; small shards have longer headers than large ones
    assert 0 < facts["most_bytes"] < 3 * a_row * (AHEAD + 4 * STEP_ROWS) < 3 * a_row * STEPS * STEP_ROWS
    assert not shards_of(cache) and not list(cache.glob("shards/*.safetensors")) and not list(cache.glob("students/*"))
    assert all(0 <= record["data_wait_share"] <= 1 for record in runs.metrics(place / "beside", "interact"))


def test_both_sides_are_killed_and_go_on(place):
    config, cache = following(place, "killed")
    teacher, learner = builder(config), student(config)
    until(lambda: told(cache).get("position", 0) >= 8, teacher)
    teacher.kill()
    teacher = builder(config)
    steps = place / "killed" / "interact" / "metrics.jsonl"
    until(lambda: steps.is_file() and len(steps.read_text().splitlines()) >= 8, learner)
    learner.kill()
    made = len(steps.read_text().splitlines())
    teacher.kill()
    learner, teacher = student(config, "--resume"), builder(config)
    assert learner.end() == 0, learner.said.read_text()
    assert teacher.end() == 0, teacher.said.read_text()
    assert runs.losses(place / "killed", "interact") == expected(place)
    assert made < STEPS or not made, "it was to be killed before its end"
    assert told(cache)["most_ahead"] <= AHEAD


def test_two_runs_learn_from_one_teacher_and_one_comes_late(place):
    first, cache = following(place, "first", cache="shared")
    late, _ = following(place, "late", cache="shared")
    teacher, learner = builder(first, "--students", "2"), student(first)
    steps = place / "first" / "interact" / "metrics.jsonl"
    # the loader reads a micro-batch ahead, so the step that ends at AHEAD is not made yet
    until(lambda: steps.is_file() and len(steps.read_text().splitlines()) == AHEAD // STEP_ROWS - 1, learner)
    time.sleep(0.5)
    facts = told(cache)
    assert facts["position"] == AHEAD and facts["kept_from"] == 0  # it waits for the other
    assert len(steps.read_text().splitlines()) == AHEAD // STEP_ROWS - 1
    other = student(late)
    assert [job.end() for job in (learner, other, teacher)] == [0, 0, 0], teacher.said.read_text()
    assert runs.losses(place / "first", "interact") == runs.losses(place / "late", "interact") == expected(place)
    assert told(cache)["most_ahead"] <= AHEAD and not shards_of(cache)


def test_keep_keeps_all_and_makes_each_row_once(place):
    config, cache = following(place, "kept")
    teacher, learner = builder(config, "--keep"), student(config)
    assert learner.end() == 0 and teacher.end() == 0, teacher.said.read_text()
    found = runs.losses(place / "kept", "interact")
    assert found[:7] == expected(place)[:7]
    assert found == pytest.approx(expected(place), rel=1e-5)  # rows that come again were made in other micro-batches
    numbers = [number for name in shards_of(cache) for number in numbers_in(cache, name)]
    assert sorted(numbers) == sorted(set(order_of(config)))


@pytest.mark.slow
def test_two_zero3_ranks_follow_two_zero3_ranks(place):
    """Ranks of the run fill an epoch's last round with rows from its start, which are deleted by then."""
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "max_steps": 9, "save_steps": 2}
    sizes["deepspeed"] = runs.zero3()
    config, cache = following(place, "ranks", timeout=60, **sizes)
    reference = configured(place, "live_ranks", **sizes)
    log = (place / "ranks.builder").open("w")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "28431"]
    command += ["-m", "vlsi_fast", "teacher", "build", "--config", str(config), "--follow", "--ahead", "18"]
    teacher = subprocess.Popen([*command, "--numbers", "float32"], env=runs.environment(), stdout=log, stderr=log)
    runs.train_several("--fresh", ("interact", config), ("interact", reference), launcher="torchrun")
    assert teacher.wait(60) == 0, (place / "ranks.builder").read_text()[-3000:]
    found, wanted = (runs.losses(place / name, "interact") for name in ("ranks", "live_ranks"))
    assert len(found) == 9 and found == pytest.approx(wanted, rel=1e-6)
    assert told(cache)["most_ahead"] <= 18 and not shards_of(cache)


# ---- a builder with a student that the test plays ----


class Played:
    """A student's file, as this test writes it."""

    def __init__(self, config, cache, name="played", **facts):
        until(lambda: (cache / "manifest.json").is_file())
        loaded = load_config(config)
        sources = build_source(loaded.data.train)
        order = order_digest(data_digest(loaded, "train", sources), loaded, 12)
        usual = {"reached": 0, "needed_from": 0, "end": 60, "step_rows": STEP_ROWS, "again": 0, "finished": False}
        path = cache / "students" / f"{name}.json"
        self.pulse = Pulse(path, loaded.teacher.cache_timeout, order=order, **(usual | facts))
        self.tell, self.stop = self.pulse.tell, self.pulse.stop


def positions(cache):
    try:
        return sorted(p for name in shards_of(cache) for p in numbers_in(cache, name, "positions"))
    except FileNotFoundError:
        return None  # deleted meanwhile


def test_the_builder_goes_no_further_and_makes_only_what_is_missing(place):
    config, cache = following(place, "played")
    teacher = builder(config)
    played = Played(config, cache)
    until(lambda: told(cache).get("position") == AHEAD, teacher)
    time.sleep(0.5)
    assert told(cache)["position"] == AHEAD and positions(cache) == list(range(AHEAD))
    played.tell(reached=8)
    until(lambda: told(cache).get("position") == 8 + AHEAD, teacher)
    assert positions(cache) == list(range(20))  # its last checkpoint is at 0
    played.tell(needed_from=6)
    until(lambda: positions(cache) == list(range(6, 20)), teacher)  # shards of two rows each
    assert told(cache)["kept_from"] == 6 and len(list(cache.glob("shards/*.safetensors"))) == 7
    teacher.kill()
    before = set(shards_of(cache))
    half = cache / "shards" / sorted(before)[0]
    (cache / "shards" / "ahead0-000000.safetensors").write_bytes(half.read_bytes())  # killed before its catalogue
    half.unlink()  # lost: its rows are made again
    teacher = builder(config)
    until(lambda: told(cache)["kept_from"] == 6 and positions(cache) == list(range(6, 20)), teacher)
    assert len(before & set(shards_of(cache))) == 6
    assert len(list(cache.glob("shards/*.safetensors"))) == 7
    played.tell(reached=0, needed_from=0)  # it has lost its checkpoints
    until(lambda: told(cache)["kept_from"] == 0 and positions(cache) == list(range(20)), teacher)
    played.tell(reached=60, needed_from=60, finished=True)
    assert teacher.end() == 0, teacher.said.read_text()
    played.stop()
    assert not shards_of(cache)


def test_rows_that_fill_the_last_round_of_an_epoch_come_again(place):
    config, cache = following(place, "filled")
    teacher = builder(config)
    played = Played(config, cache, reached=38, needed_from=38, again=3)
    until(lambda: told(cache).get("position") == 38 + AHEAD, teacher)
    found = [pair for name in shards_of(cache) for pair in _places(cache, name)]
    teacher.kill()
    played.stop()
    rows = order_of(config)
    assert sorted(found) == sorted([(rows[p], p) for p in range(38, 50)] + [(n, -40) for n in rows[:3]])


def _places(cache, name):
    return zip(numbers_in(cache, name), numbers_in(cache, name, "positions"))


# ---- who is gone ----


def test_a_gone_builder_is_noticed(place):
    config, cache = following(place, "orphaned", timeout=6)
    learner = student(config)
    assert learner.end() == 1
    assert "there is none" in learner.said.read_text() and "teacher build --follow" in learner.said.read_text()
    teacher = builder(config, "--teacher.cache_timeout", "120")
    learner = student(config)
    until(lambda: told(cache).get("position", 0) >= 8, teacher)
    teacher.kill()
    assert learner.end() == 1
    assert "it gave no sign of life" in learner.said.read_text() and "--resume" in learner.said.read_text()


def test_a_gone_student_is_noticed(place):
    config, cache = following(place, "alone", timeout=6)
    teacher = builder(config)
    assert teacher.end() == 1 and "0 of 1 runs" in teacher.said.read_text()
    assert told(cache)["state"] == "failed" and "0 of 1 runs" in told(cache)["error"]
    played = Played(config, cache, reached=4, needed_from=4)
    teacher = builder(config)
    until(lambda: told(cache).get("position") == 4 + AHEAD, teacher)
    played.stop()
    assert teacher.end() == 1
    assert "played.json: that run has given no sign of life for 6 s" in teacher.said.read_text()


def test_who_cannot_be_served_is_told(place, tmp_path):
    def looked(count=1, least=8, **facts):
        Pulse(tmp_path / "students" / "one.json", 4, **({"order": "o", "step_rows": 4} | facts)).stop()
        Students(tmp_path, count, "o", least, 4).look()

    looked()
    with pytest.raises(CacheError, match="in another order"):
        looked(order="other")
    with pytest.raises(CacheError, match="raise it by 4 or more"):
        looked(step_rows=12)
    Pulse(tmp_path / "students" / "two.json", 4, order="o", step_rows=4).stop()
    with pytest.raises(CacheError, match="has 2 runs"):
        looked()
    config, _ = following(place, "refused")
    build = ["teacher", "build", "--config", str(config)]
    for words in (["--ahead", "8"], ["--keep"], ["--students", "2"], ["--follow", "--rows", "3"]):
        assert main([*build, *words]) == 2
    assert main([*build, "--follow", "--ahead", "2"]) == 2
    with pytest.raises(ConfigError, match="set mode to cached"):
        load_config(config, ["--teacher.mode", "auto"])


# ---- rows ----


def test_a_row_that_will_not_come_is_not_waited_for(place):
    cache = place / "whole"
    rows = FollowedRows(LiveReader(cache), [0], timeout=0.3)
    pulse = Pulse(cache / "builder.json", 60, state="running", position=8, kept_from=0)
    try:
        rows.place, rows.total = (4, 8), 40
        assert rows.find(b"k" * 16) is None  # the builder is past it
        rows.place, rows.timeout = (40, 44), 60
        assert rows.find(b"k" * 16) is None  # no step reads it
        rows.place, rows.timeout = (8, 12), 0.3
        pulse.stop()
        with pytest.raises(CacheError, match="no sign of life"):
            rows.find(b"k" * 16)
        began = time.monotonic()
        with pytest.raises(CacheError):
            rows.find(b"j" * 16)  # known to be gone: once is enough
        assert time.monotonic() - began < 0.2
        pulse.tell(state="finished")
        assert rows.find(b"k" * 16) is None
        pulse.tell(kept_from=10)  # what this row needs was deleted: another builder has to make it
        with pytest.raises(CacheError, match="it has finished"):
            rows.find(b"k" * 16)
    finally:
        (cache / "builder.json").unlink()


def test_silence_is_counted_by_ones_own_clock():
    silence = Silence()
    silence.begin()
    assert silence.seconds({"life": "a", "count": 5}) < 0.1
    time.sleep(0.15)
    assert silence.seconds({"life": "a", "count": 5}) >= 0.15
    assert silence.seconds({"life": "b", "count": 5}) < 0.1  # another process, whatever its counter
    time.sleep(0.15)
    assert silence.seconds(None) >= 0.15


def test_positions_of_steps():
    class Order(list):
        epoch = 1

    def batches(count, ranks, drop_last=False):
        found = StepBatches(Order(range(count)), 2, 2, ranks, 0, None, drop_last)
        found.placed = True
        return found

    one = batches(10, 1)
    assert [one.position(step) for step in range(5)] == [0, 4, 8, 10, 14] and one.again == 0
    assert [(n.first, n.end) for batch in one for n in batch] == [(10, 14)] * 4 + [(14, 18)] * 4 + [(18, 20)] * 2
    two = batches(10, 2)
    assert two.again == 2 and [two.position(step) for step in range(4)] == [0, 8, 10, 18]
    assert [n for batch in two for n in batch] == [0, 1, 4, 5, 8, 9]
    dropped = batches(10, 2, True)
    assert dropped.again == 0 and [dropped.position(step) for step in range(3)] == [0, 10, 20]
    placed = Placed(3, 4, 8)
    again = placed.__reduce__()[0](*placed.__reduce__()[1])
    assert (again, again.first, again.end) == (3, 4, 8)
