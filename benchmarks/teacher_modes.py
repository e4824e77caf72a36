"""Which teacher mode when: the planner's numbers of stage interact as Markdown tables.

    python benchmarks/teacher_modes.py (docs/teacher-cache.md has what it prints)

Predicted, nothing is measured: 8 GPUs of 80 GiB in one machine, A100's peak x 0.45, configs/zero3.json; memory of rows
of 4096 tokens with 512 answer tokens, time and disk of 1536 and 128. A test compares the file with the planner.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vlsi_fast.config import load_config
from vlsi_fast.planner.arguments import Machine
from vlsi_fast.planner.build import Models, setup_of, step_of
from vlsi_fast.planner.memory import RESERVE_BYTES
from vlsi_fast.planner.report import rows_of
from vlsi_fast.planner.speed import over_pcie, speed, traffic
from vlsi_fast.planner.walk import walk
from vlsi_fast.planner.window import with_window
from vlsi_fast.planner.worth import build_step

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PAIRS = {"72B to 2B": "qwen2vl_72b_to_2b", "72B to 7B": "qwen2vl_72b_to_7b"}
COUNTS = {"100K": 100_000, "2.9M": 2_900_000}
MODES = {
    "zero3": "exact",
    "zero3, window 1": "exact",
    "replicated": "exact",
    "offload": "exact",
    "int8": "a quantised teacher",
    "nf4": "a quantised teacher",
}
FORMS = {
    ("targets", "float32"): "exact",
    ("targets", "float16"): "rounded",
    ("targets", "int8"): "rounded more",
    ("hidden", "bfloat16"): "exact",
}
NOTE = """\
Predicted, not measured (`benchmarks/teacher_modes.py`): stage interact on 8 GPUs of 80 GiB in one machine, ZeRO-3,
A100's peak x 0.45. Memory is that of rows of 4096 tokens with 512 answer tokens, beside 3 GiB of reserve; time and disk
that of 1536 and 128 tokens. `zero3` and `offload` have `teacher.window: auto`, which takes memory that is there. *GB
moved*: gathered and reduced on a GPU's links, or taken over PCIe, for a micro-batch of two rows. *GB/s read*: from
disk, by the machine, at most. *Days*: from communication wholly hidden to not at all; 100K rows take a 29th. *Disk*:
all 20 target layers and the last.
"""
HEAD = (
    "`teacher.mode`",
    "GiB a GPU",
    "GB moved",
    "GB/s read",
    "days for 2.9M",
    "days to build",
    "100K on disk",
    "2.9M on disk",
    "KL",
)


def table(name: str) -> list[str]:
    """Markdown lines of one pair."""
    config = load_config(CONFIGS / f"{name}.yaml", {"training.deepspeed": str(CONFIGS / "zero3.json")})
    models, machine = Models(config), Machine()
    rows, room = rows_of(config, models), machine.memory_bytes - RESERVE_BYTES
    micro = config.stage_training("interact").per_device_train_batch_size
    plain = setup_of(config, "interact", machine.ranks)
    lines = [HEAD, ("---",) * len(HEAD)]

    def interact(mode: str, form: tuple[str, str] | None = None) -> tuple[list[str], object]:
        setup = dataclasses.replace(plain, teacher_mode=mode.removesuffix(", window 1"))
        if setup.teacher_mode == mode:
            setup = with_window(models, "interact", setup, rows.batch(micro), room)
        longest, mean = (step_of(models, "interact", setup, rows.batch(micro, mean=each)) for each in (False, True))
        if form is not None:
            longest, mean = (dataclasses.replace(s, recalled=s.recalled.as_form(*form)) for s in (longest, mean))
        peak = walk(longest).peak.total
        moved = sum(traffic(mean).values()) + over_pcie(mean)
        size = f"{peak / 2**30:.0f}" + ("" if peak <= room else " (too much)")
        found, time = mean.recalled, speed(mean, machine)
        read = found and rows.mean_answers * found.token_bytes(found.kept) * time.samples / time.hidden / 1e9
        cells = [size, f"{moved / 1e9:.0f}", f"{read:.1f}" if read else "-", _span(time.days(COUNTS["2.9M"]))]
        return cells, found

    for mode, exact in MODES.items():
        lines.append(
            ("`zero3`, window 1" if mode.endswith("1") else f"`{mode}`", *interact(mode)[0], "-", "-", "-", exact)
        )
    for form, exact in FORMS.items():
        cells, found = interact("cached", form)
        built = speed(build_step(models, plain, rows.batch(micro, mean=True), found, "zero3"), machine)
        sizes = (count * rows.mean_answers * found.token_bytes(found.kept) for count in COUNTS.values())
        disk = (f"{size / 1e12:.1f} TB" for size in sizes)
        label = f"`cached`, {form[0]}" + (f" in {form[1]}" if form[0] == "targets" else "")
        lines.append((label, *cells, _span(built.days(COUNTS["2.9M"])), *disk, exact))
    return ["| " + " | ".join(line) + " |" for line in lines]


def _span(ends: tuple[float, float]) -> str:
    return " - ".join(dict.fromkeys(f"{value:.1f}" for value in ends))


def page() -> str:
    """The whole file."""
    lines = []
    for title, name in PAIRS.items():
        lines += [f"**{title}**", "", *table(name), ""]
    return "\n".join([*lines, NOTE])


if __name__ == "__main__":
    print(page(), end="")
