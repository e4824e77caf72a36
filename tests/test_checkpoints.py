"""A checkpoint is what was written: damage is found and named, files run nothing, one run at a time, a full disk."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs as runs
import torch
from forked_ranks import ForkedRanks
from safetensors.torch import load_file, save_file

from vlsi_fast import checkpoints, disk, load_config, locking, run
from vlsi_fast.checkpoints import drop_newer, keep_newest, last_checkpoint, read_manifest
from vlsi_fast.cli import train_main
from vlsi_fast.errors import StoppedEarly
from vlsi_fast.lineage import LineageError, read_record, write_record
from vlsi_fast.resuming import checkpoint_to_resume
from vlsi_fast.unpickling import UnsafeFileError, data_only

STEPS = {"max_steps": 4, "save_steps": 2, "save_total_limit": None}


def config_of(workspace, output, **training) -> Path:
    tree = runs.settings(workspace, output, **(STEPS | training)) | {"sft": {"start_from": "base"}}
    tree["preflight"] = False
    return runs.write_config(tree, output.parent / f"{output.name}.json")


@pytest.fixture(scope="module")
def whole(workspace, tmp_path_factory):
    """`run/sft` of a finished run with checkpoints 2 and 4."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(load_config(config_of(workspace, output)), "sft")
    return output


@pytest.fixture
def stopped(workspace, whole, tmp_path):
    """Stage's folder and config of a copy that stopped after its last checkpoint."""
    shutil.copytree(whole / "sft", tmp_path / "run" / "sft")
    runs.rewind(tmp_path / "run" / "sft", 4)
    return tmp_path / "run" / "sft", load_config(config_of(workspace, tmp_path / "run"))


def same_result(one: Path, two: Path) -> bool:
    a, b = (load_file(folder / "student" / "model.safetensors") for folder in (one, two))
    steps = [[(r["step"], r["loss"]) for r in runs.metrics(f.parent, f.name)] for f in (one, two)]
    return steps[0] == steps[1] and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the manifest ----


def test_a_manifest_lists_every_file_of_a_checkpoint(whole):
    folder = whole / "sft" / "checkpoint-2"
    manifest = read_manifest(folder)
    there = {p.name: p for p in folder.iterdir() if p.name != "manifest.json"}
    assert manifest["files"].keys() == there.keys() >= {"trainable.safetensors", "optimizer.pt", "trainer_state.json"}
    for name, path in there.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert manifest["files"][name] == {"size": path.stat().st_size, "sha256": digest}
    lines = (whole / "sft" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    start = b"".join(lines[:2])
    assert manifest["metrics"] == {"size": len(start), "sha256": hashlib.sha256(start).hexdigest()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "flipped weights": (lambda f: flip(f / "trainable.safetensors"), "trainable.safetensors is not what was written"),
    "flipped state": (lambda f: flip(f / "trainer_state.json"), "trainer_state.json is not what was written"),
    "no optimizer": (lambda f: (f / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "short optimizer": (lambda f: halve(f / "optimizer.pt"), "optimizer.pt has .* bytes, not"),
    "no random state": (lambda f: (f / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "another file": (lambda f: (f / "scaler.pt").write_bytes(b"x"), "scaler.pt is not of this checkpoint"),
    "short manifest": (lambda f: halve(f / "manifest.json"), "manifest.json cannot be read"),
    "other manifest": (lambda f: (f / "manifest.json").write_text('{"files": []}'), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(stopped, capsys, damage, message):
    folder, _ = stopped
    record = read_record(folder)
    damage(folder / "checkpoint-4")
    assert checkpoint_to_resume(folder, record) == str(folder / "checkpoint-2")
    said = capsys.readouterr().out
    assert re.search(f"checkpoint-4 is not what was written: {message}", said) and "goes on from checkpoint-2" in said
    damage(folder / "checkpoint-2")
    both = f"(?s)no checkpoint .*checkpoint-4 .*{message}.*checkpoint-2.*{message}.*delete the checkpoint folders"
    with pytest.raises(LineageError, match=both):
        checkpoint_to_resume(folder, record)


def test_records_of_the_steps_belong_to_a_checkpoint(stopped, capsys):
    folder, _ = stopped
    record, path = read_record(folder), folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + '{"step": 5, "lo')  # of a step that a resumed run makes again
    assert checkpoint_to_resume(folder, record) == str(folder / "checkpoint-4")
    path.write_text("".join(lines[:3]))
    assert checkpoint_to_resume(folder, record) == str(folder / "checkpoint-2")
    assert "metrics.jsonl does not hold what it did up to step 4" in capsys.readouterr().out
    path.unlink()
    with pytest.raises(LineageError, match="metrics.jsonl is missing"):
        checkpoint_to_resume(folder, record)


def test_a_checkpoint_that_was_being_written_is_passed_over(stopped, capsys):
    folder, _ = stopped
    for step in (4, 2):
        (folder / f"checkpoint-{step}" / "manifest.json").unlink()
        expected = str(folder / "checkpoint-2") if step == 4 else None
        assert checkpoint_to_resume(folder, read_record(folder)) == last_checkpoint(folder) == expected
    assert capsys.readouterr().out == ""


def test_checkpoints_of_an_older_version_are_refused(stopped):
    folder, _ = stopped
    for step in (2, 4):
        (folder / f"checkpoint-{step}" / "manifest.json").unlink()
    write_record(folder, read_record(folder) | {"format": 1})
    with pytest.raises(LineageError, match="begun by an older vlsi-fast"):
        checkpoint_to_resume(folder, read_record(folder))


def test_checkpoints_go_once_a_newer_one_is_whole(tmp_path):
    for step in (2, 10, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    drop_newer(tmp_path, tmp_path / "checkpoint-6")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6", "checkpoint-x"]
    keep_newest(tmp_path, None)
    keep_newest(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-x"]
    drop_newer(tmp_path, None)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-x"]


def test_a_flipped_byte_costs_steps_and_no_numbers(stopped, whole, capsys):
    folder, config = stopped
    flip(folder / "checkpoint-4" / "trainable.safetensors")
    run(config, "sft", resume=True)
    assert "trainable.safetensors is not what was written" in capsys.readouterr().out
    assert same_result(folder, whole / "sft")
    assert not checkpoints.damage(folder / "checkpoint-4"), "written anew"


# ---- pickles ----


class Planted:
    """Runs a command when it is unpickled as a pickle may."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def plant(file: Path, mark: Path) -> None:
    """Put such a pickle in a checkpoint's file, with a manifest that agrees: whoever can write one can write both."""
    torch.save(Planted(mark), file)
    folder = next(p for p in file.parents if p.name.startswith("checkpoint-"))
    manifest = read_manifest(folder)
    manifest["files"] |= checkpoints.describe(folder, [file.relative_to(folder).as_posix()])
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_file_of_a_checkpoint_runs_code(stopped, tmp_path, name):
    folder, config = stopped
    runs.rewind(folder, 2)  # at its last step a run would draw no more, and not read the state of what draws
    plant(folder / "checkpoint-2" / name, tmp_path / "ran")
    with pytest.raises(UnsafeFileError, match=f"checkpoint-2/{name} is refused.*It was not run"):
        run(config, "sft", resume=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_what_asks_for_pickles_gets_data(tmp_path, new_format):
    """As DeepSpeed asks, in both of torch's formats."""
    file, mark = tmp_path / "file.pt", tmp_path / "ran"
    torch.save({"a": Planted(mark)}, file, _use_new_zipfile_serialization=new_format)
    with data_only(), pytest.raises(UnsafeFileError, match="mkdir"):
        torch.load(file, weights_only=False)
    assert not mark.exists()
    torch.save({"a": torch.ones(2), "b": [1, None, "x"]}, file, _use_new_zipfile_serialization=new_format)
    with data_only():
        assert torch.load(file, weights_only=False)["b"] == [1, None, "x"]
    torch.save(Planted(mark), file)
    torch.load(file, weights_only=False)
    assert mark.exists(), "the plant works where nothing guards"


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04" + bytes(100), b"\x80\x02."])
def test_damaged_pickles_are_named(tmp_path, content):
    (tmp_path / "file.pt").write_bytes(content)
    with data_only(), pytest.raises(UnsafeFileError, match="file.pt is refused"):
        torch.load(tmp_path / "file.pt", weights_only=False)


# ---- one run at a time ----

HOLDER = """
import sys, time, os
from pathlib import Path
from vlsi_fast.locking import claimed
with claimed(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(60)  # a worker that outlives its parent
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of `tmp_path/run/sft`, and a child that outlives it."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / "sft")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=runs.environment(), start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_two_runs_into_one_folder(stopped, holder, monkeypatch, capsys):
    folder, config = stopped
    monkeypatch.setattr(locking, "WAIT_SECONDS", 0.3)
    before = (folder / "vlsi_stage.json").read_bytes()
    with pytest.raises(LineageError, match="another run is writing to .*run/sft") as caught:
        run(config, "sft", resume=True)
    assert f"host {socket.gethostname()}, pid {holder.pid}" in str(caught.value) and "--output_dir" in str(caught.value)
    assert (folder / "vlsi_stage.json").read_bytes() == before
    holder.kill()  # its child lives on
    holder.wait()
    with locking.claimed(folder):
        assert f"pid {os.getpid()}" in (folder.parent / ".sft.lock").read_text()


def test_a_killed_run_is_waited_for(tmp_path, holder, monkeypatch, capsys):
    monkeypatch.setattr(locking, "WAIT_SECONDS", 20.0)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    began = time.monotonic()
    with locking.claimed(tmp_path / "run" / "sft"):
        assert 0.3 < time.monotonic() - began < 15
    assert f"pid {holder.pid}" in capsys.readouterr().out
    killer.wait()


def test_a_lock_is_free_again_and_kept_from_its_own_process(tmp_path):
    folder = tmp_path / "run" / "sft"
    for _ in range(2):
        with locking.claimed(folder):
            with pytest.raises(LineageError, match="this very process"):
                with locking.claimed(folder):
                    pass
    with locking.claimed(tmp_path / "run" / "interact"), locking.claimed(folder):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking.fcntl, "lockf", none)
    with locking.claimed(tmp_path / "run" / "sft"):
        pass
    assert "cannot be locked (No locks available): start no second run there" in capsys.readouterr().out


# ---- a full disk ----


@pytest.fixture
def small_disk(tmp_path):
    """Factory of a file system of so many bytes."""
    mounted = []

    def make(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_every_writer_of_a_full_disk_is_understood(small_disk):
    folder, tensor = small_disk(1 << 20), {"a": torch.zeros(1 << 19)}
    writers = {
        "archive": lambda p: torch.save(tensor, p),
        "older": lambda p: torch.save(tensor, p, _use_new_zipfile_serialization=False),
        "safetensors": lambda p: save_file(tensor, p),
        "text": lambda p: p.write_text("x" * (1 << 21)),
    }
    for name, write in writers.items():
        with pytest.raises(Exception) as caught:
            write(folder / "file")
        assert disk.is_full_disk(caught.value, folder), name
        (folder / "file").unlink(missing_ok=True)
    assert not disk.is_full_disk(RuntimeError("inline_container.cc: unexpected pos"), folder), "there is room now"


def test_a_disk_that_fills_while_saving(workspace, whole, small_disk, capsys):
    """The real thing: room for one checkpoint and a half."""
    size = checkpoints.checkpoint_bytes(whole / "sft" / "checkpoint-2")
    output = small_disk(int(1.6 * size) + (64 << 10)) / "run"
    tree = json.loads(config_of(workspace, whole.parent / "small").read_text()) | {"output_dir": str(output)}
    config = runs.write_config(tree, whole.parent / "small.json")
    assert train_main(["--stage", "sft", "--config", str(config)]) == 1
    said = capsys.readouterr().err
    size = checkpoints.checkpoint_bytes(output / "sft" / "checkpoint-2")
    assert f"the disk of {output / 'sft'} is full: " in said and f"a checkpoint of stage sft needs {size:,} (" in said
    assert "--resume continues from checkpoint-2" in said and "Traceback" not in said
    assert [p.name for p in (output / "sft").glob("checkpoint-*")] == ["checkpoint-2"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(output.parent)], check=True)
    assert train_main(["--stage", "sft", "--config", str(config), "--resume"]) == 0
    assert same_result(output / "sft", whole / "sft")


@pytest.mark.parametrize("where", ["first checkpoint", "result"])
def test_no_room_for(workspace, tmp_path, monkeypatch, where):
    """The same without a mount: nothing kept yet, and the export."""
    config = load_config(config_of(workspace, tmp_path / "run"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "result":
        from vlsi_fast.stages import STAGE_CLASSES

        monkeypatch.setattr(STAGE_CLASSES["sft"], "save", full)
    else:
        monkeypatch.setattr(torch, "save", full)
    words = "starts the stage over"
    if where == "result":
        words = "the result of stage sft needs .*continues from checkpoint-4"
    with pytest.raises(disk.DiskFullError, match=words):
        run(config, "sft")
    assert read_record(tmp_path / "run" / "sft")["state"] == "running"
    assert len(list((tmp_path / "run" / "sft").glob("checkpoint-*"))) == (2 if where == "result" else 0)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="Input/output"), disk.explained_full_disk(tmp_path, "x", lambda folder: 0):
        raise OSError(errno.EIO, "Input/output error")


# ---- several ranks under DeepSpeed ----

STAGES = ("verbalize", "interact", "sft")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Starts stages on two ranks with ZeRO-3, quickly."""
    found = ForkedRanks(runs.environment(), tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()


def sharded_config(workspace, output, **training) -> Path:
    tree = json.loads(config_of(workspace, output, **training).read_text()) | {"sft": {}, "matching": {}}
    tree["training"] |= {"deepspeed": runs.zero3(), "max_steps": 8, "gradient_accumulation_steps": 1}
    return runs.write_config(tree, output.parent / f"{output.name}.json")


@pytest.fixture(scope="module")
def sharded(workspace, tmp_path_factory, ranks):
    """All stages on two ranks, uninterrupted, with checkpoints 2, 4, 6 and 8."""
    output = tmp_path_factory.mktemp("sharded") / "run"
    done = ranks.run(sharded_config(workspace, output), "all")
    assert done["codes"] == [0, 0], done["said"][-3000:]
    return output


@pytest.mark.slow
def test_killed_while_saving_many_times_a_run_is_what_it_would_have_been(workspace, sharded, ranks, tmp_path):
    """kill -9 of all ranks at random moments of saving, three times a stage."""
    config, hits = sharded_config(workspace, tmp_path / "run", save_total_limit=1), 0
    for seed in range(9):
        killed = ranks.run(config, "all", kill=(STAGES[seed // 3], seed))
        assert killed["codes"] == [signal.SIGKILL] * 2, killed["said"][-3000:]
        hits += killed["hit"]
    done = ranks.run(config, "all")
    assert done["codes"] == [0, 0], done["said"][-3000:]
    assert "is not what was written" not in done["said"]
    for stage in STAGES:
        keep = ("step", "loss", "kl", "matches", "learning_rate", "answer_tokens", "rows")
        records = [[{k: r.get(k) for k in keep} for r in runs.metrics(o, stage)] for o in (tmp_path / "run", sharded)]
        assert records[0] == records[1]
        for one in sorted((sharded / stage).glob("*/*.safetensors")):
            if "checkpoint-" not in str(one):
                a, b = load_file(one), load_file(tmp_path / "run" / stage / one.relative_to(sharded / stage))
                assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), one
        assert [p.name for p in (tmp_path / "run" / stage).glob("checkpoint-*")] == ["checkpoint-8"]
    assert hits >= 3, "nearly all kills came between checkpoints"


@pytest.mark.slow
def test_asked_to_end_ranks_save_and_go_on(workspace, sharded, ranks, tmp_path):
    """SIGTERM to all ranks, as a cluster sends it before it takes the machine."""
    config = sharded_config(workspace, tmp_path / "run")
    asked = ranks.run(config, "all", ask="interact")
    assert asked["codes"] == [StoppedEarly.exit_code << 8] * 2, asked["said"][-3000:]
    made = runs.metrics(tmp_path / "run", "interact")[-1]["step"]
    assert made < 8 and (tmp_path / "run" / "interact" / f"checkpoint-{made}" / "manifest.json").is_file()
    told = f"stopped in stage interact after optimizer step {made} of 8, since it was asked to end (SIGTERM)"
    assert asked["said"].count(told) == 1 and "Traceback" not in asked["said"]
    assert read_record(tmp_path / "run" / "interact")["state"] == "running"
    done = ranks.run(config, "all")
    assert done["codes"] == [0, 0], done["said"][-3000:]
    for stage in STAGES:
        losses = [[(r["loss"], r.get("matches")) for r in runs.metrics(o, stage)] for o in (tmp_path / "run", sharded)]
        assert losses[0] == losses[1]


@pytest.mark.slow
def test_files_of_all_ranks_are_in_the_manifest(sharded):
    for stage in STAGES:
        for folder in checkpoints.checkpoints(sharded / stage):
            names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
            assert read_manifest(folder)["files"].keys() == names
            assert {checkpoints.writer_of(name) for name in names} == {0, 1}
            assert not checkpoints.damage(folder)


@pytest.mark.slow
def test_no_file_of_deepspeed_runs_code(workspace, sharded, ranks, tmp_path):
    """Of each kind, on the rank that reads it; and where one rank has them converted."""
    folder = shutil.copytree(sharded / "verbalize", tmp_path / "run" / "verbalize")
    runs.rewind(folder, 2)
    config = sharded_config(workspace, tmp_path / "run")
    shutil.copytree(folder / "checkpoint-2", tmp_path / "kept")
    parts = "checkpoint-2/global_step2/zero_pp_rank_{}_mp_rank_00_{}_states.pt"
    kinds = [parts.format(0, "model"), parts.format(1, "optim")]
    kinds += [f"checkpoint-2/{name}" for name in ("scheduler.pt", "rng_state_1.pth")]
    for count, name in [*((2, name) for name in kinds), (1, parts.format(1, "optim"))]:
        if count == 1:
            tree = json.loads(config.read_text())
            tree["training"]["gradient_accumulation_steps"] *= 2
            runs.write_config(tree, config)
        shutil.rmtree(folder / "checkpoint-2")
        shutil.copytree(tmp_path / "kept", folder / "checkpoint-2")
        plant(folder / name, tmp_path / "ran")
        done = ranks.run(config, "verbalize", ranks=count)
        assert f"{name} is refused" in done["said"], (name, done["said"][-3000:])
        assert 2 in [os.waitstatus_to_exitcode(code) for code in done["codes"]]
        assert not (tmp_path / "ran").exists(), name
    assert not (folder / "checkpoint-2" / "global_step2_universal" / "manifest.json").exists()


@pytest.mark.slow
def test_ranks_learn_that_the_folder_is_taken(workspace, ranks, holder, tmp_path):
    config = json.loads(sharded_config(workspace, tmp_path / "run").read_text()) | {"sft": {"start_from": "base"}}
    done = ranks.run(runs.write_config(config, tmp_path / "run.json"), "sft")
    assert [os.waitstatus_to_exitcode(code) for code in done["codes"]] == [2, 2], done["said"][-3000:]
    assert done["said"].count("another run is writing to") == 1 and f"pid {holder.pid}" in done["said"]


@pytest.mark.slow
def test_a_disk_that_fills_under_deepspeed(workspace, sharded, ranks, small_disk, tmp_path):
    size = checkpoints.checkpoint_bytes(sharded / "verbalize" / "checkpoint-2")
    output = small_disk(int(1.6 * size) + (64 << 10)) / "run"
    config = sharded_config(workspace, tmp_path / "run")
    runs.write_config(json.loads(config.read_text()) | {"output_dir": str(output)}, config)
    done = ranks.run(config, "verbalize")
    assert 1 in [os.waitstatus_to_exitcode(code) for code in done["codes"]], done["said"][-3000:]
    assert f"the disk of {output / 'verbalize'} is full: " in done["said"]
    assert last_checkpoint(output / "verbalize") == str(output / "verbalize" / "checkpoint-2")
    subprocess.run(["mount", "-o", "remount,size=64m", str(output.parent)], check=True)
    done = ranks.run(config, "verbalize")
    assert done["codes"] == [0, 0], done["said"][-3000:]
    assert runs.losses(output, "verbalize") == runs.losses(sharded, "verbalize")


ZERO_STAGES = """
import sys, deepspeed, torch
from vlsi_fast.unpickling import data_only

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
for stage in range(4):
    for bf16 in (False, True):
        net = torch.nn.Linear(8, 8)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
        config |= {"bf16": {"enabled": bf16}, "zero_allow_untested_optimizer": True}
        engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(net.parameters()), config=config)
        x = torch.ones(1, 8, dtype=torch.bfloat16 if bf16 else torch.float32)
        engine.backward(engine(x).float().sum())
        engine.step()
        engine.save_checkpoint(f"{sys.argv[1]}/{stage}{bf16}")
        with data_only():
            assert engine.load_checkpoint(f"{sys.argv[1]}/{stage}{bf16}")[0]
        print("loaded", flush=True)
"""


@pytest.mark.slow
def test_checkpoints_of_every_zero_stage_are_data(tmp_path):
    """The allow-list is long enough for all that DeepSpeed's engines store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        ranks["MASTER_PORT"] = str(free.getsockname()[1])
    command = [sys.executable, "-c", ZERO_STAGES, str(tmp_path)]
    done = subprocess.run(command, env=runs.environment(**ranks), text=True, capture_output=True)
    assert done.stdout.count("loaded") == 8, done.stderr[-3000:]
