"""A tiny teacher and student on disk, a small dataset of real PNG files, and runs on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import tiny
import torch.distributed as dist
from PIL import Image, ImageDraw

from vlsi_fast.lineage import read_record, write_record

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1200
"""Seconds a launched process may take: far more than on a slow and busy machine, for it only ends what hangs."""
COLORS = ["red", "green", "blue", "yellow", "black", "gray"]


def make_models(folder: Path) -> None:
    """`folder/teacher` (6 layers, width 48) and `folder/student` (4 layers, width 32, tied head)."""
    for role, options in (
        ("teacher", {"hidden": 48, "layers": 6, "seed": 1}),
        ("student", {"hidden": 32, "layers": 4, "seed": 2, "tied": True}),
    ):
        processor = tiny.make_processor("tiny", patch_size=8, min_pixels=1024, max_pixels=1024)
        tiny.make_model(tokenizer=processor.tokenizer, patch_size=8, **options).save_pretrained(folder / role)
        processor.save_pretrained(folder / role)


def make_rows(folder: Path, count: int = 48) -> Path:
    """`folder/rows.jsonl`: one image each, answers of one to four words."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        color = COLORS[i % len(COLORS)]
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).ellipse((4 + i % 8, 4, 20 + i % 8, 24), fill=color)
        image.save(folder / "images" / f"{i}.png")
        answer = [color, f"a {color} circle", f"yes, a {color} circle"][i % 3]
        messages = [
            {"role": "user", "content": f"<image>What is in image {i}?"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"images": [f"images/{i}.png"], "messages": messages}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(folder: Path, output: Path, **training) -> dict:
    """A run's config as a mapping, with `folder`'s models and rows."""
    return {
        "output_dir": str(output),
        "dtype": "float32",
        "teacher": {"path": str(folder / "teacher"), "layers": [1, 2, 3, 4, 5]},
        "student": {"path": str(folder / "student"), "layers": [1, 2, 3]},
        "lora": {"rank": 8, "alpha": 8},
        "matching": {"strategy": "uniform"},
        "data": {"train": [{"reader": "messages", "path": str(folder / "rows.jsonl")}]},
        "training": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "save_steps": 100,
            "learning_rate": 1e-3,
            "report_to": [],
            "gradient_checkpointing": False,
        }
        | training,
    }


def metrics(output: Path, stage: str) -> list[dict]:
    """The records of a stage, one a step."""
    return [json.loads(line) for line in (Path(output) / stage / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path, stage: str) -> list[float]:
    return [record["loss"] for record in metrics(output, stage)]


def zero3() -> dict:
    """The shipped preset with every parameter sharded: tiny ones would otherwise be kept whole."""
    preset = json.loads((ROOT / "configs" / "zero3.json").read_text())
    preset["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return preset


def write_config(tree: dict, path: Path) -> Path:
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def environment(**extra) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"} | extra


def train_command(config: Path, stage: str, *arguments: str, ranks: int = 0) -> list[str]:
    """Plain python, or the deepspeed launcher where ranks are given."""
    launcher = [sys.executable]
    if ranks:
        port = 29500 + os.getpid() % 1000
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
        launcher += ["--master_port", str(port)]
    return [*launcher, str(ROOT / "vlsi_fast" / "train.py"), "--stage", stage, "--config", str(config), *arguments]


def train(config: Path, stage: str, *arguments: str, ranks: int = 0, timeout: int = LIMIT):
    """Run train.py to its end. Returns the finished process; its output is in `.stdout`."""
    return subprocess.run(
        train_command(config, stage, *arguments, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def rewind(folder: Path, step: int) -> None:
    """Leave a finished stage's folder as a job that died after checkpoint-`step` does."""
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rsplit("-", 1)[1]) > step:
            shutil.rmtree(checkpoint)
    write_record(folder, read_record(folder) | {"state": "running"})


def launch_ranks(script: str, ranks: int, *arguments: str, port: int = 28000, command: list[str] | None = None) -> None:
    """`tests/SCRIPT ARGUMENTS` on several ranks under torchrun, or under another `command`; fails with what it says."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    launcher = command or [*launcher, "--master_port", str(port + os.getpid() % 1000)]
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])
    done = subprocess.run(
        [*launcher, str(ROOT / "tests" / script), *arguments],
        cwd=ROOT,
        env=environment(PYTHONPATH=search),
        timeout=LIMIT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def leave_ranks() -> None:
    """End a launched script's rank at once, without the interpreter's clean-up.

    A thread of gloo that is late to drop a finished collective's tensors asks for the interpreter's lock while that
    ends, and the process aborts (pytorch/pytorch#179291). It happens on busy machines. DeepSpeed holds the process
    groups, so `destroy_process_group` does not join these threads.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def begin_job(job: str) -> tuple[str, str, str, bool]:
    """A job `NAME[:SOURCE:STEP]=STAGE=CONFIG` of such a script: what to call its result, stage, config file, whether it
    resumes. With SOURCE it goes on from that run's checkpoint STEP. Collective."""
    from vlsi_fast import load_config
    from vlsi_fast.ranks.sharding import barrier, rank

    name, stage, path = job.split("=", 2)
    name, *source = name.split(":")
    output = Path(load_config(path).output_dir)
    if source and rank() == 0:
        shutil.copytree(output.parent / source[0], output)
        rewind(output / stage, int(source[1]))
    barrier()
    return f"{name} {stage}", stage, path, bool(source)


def train_several(mode: str, *jobs: tuple[str, Path], launcher: str = "deepspeed", ranks: int = 2) -> str:
    """(stage, config) one after the other in one launch, since starting takes longer than tiny models' steps.

    mode: "--fresh" or "--resume"; launcher: "deepspeed" or "torchrun", which starts faster. Returns what was printed.
    """
    command = train_command(Path(), "", ranks=ranks if launcher == "deepspeed" else 0)
    command = command[: command.index(str(ROOT / "vlsi_fast" / "train.py"))]
    if launcher == "torchrun":
        port = str(27000 + os.getpid() % 1000)
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]
    command += [str(Path(__file__).with_name("run_several.py")), mode, *(f"{stage}={config}" for stage, config in jobs)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), timeout=LIMIT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
