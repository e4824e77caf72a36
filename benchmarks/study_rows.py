"""What the rows of table 4 and figure 4 change, as overrides of `configs/study.yaml`, with controls in each table.

Controls have as many optimizer steps as VLsI's three stages together: `sft alone` makes them all with sft,
`last-layer KL` gives those of verbalize, which it has no use for, to interact.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from vlsi_fast.config import RunConfig


@dataclass(frozen=True)
class Row:
    """One way to train the student. A stage that is None does not take place."""

    name: str
    paper: tuple[str, ...] = ()
    """Rows of the paper's table that it stands for (several: their mean)."""
    interact: dict[str, Any] | None = field(default_factory=dict)
    """Overrides of the config for stage interact."""
    sft: dict[str, Any] | None = field(default_factory=dict)
    """Overrides for stage sft."""
    verbalizer: dict[str, Any] = field(default_factory=dict)
    """Overrides for stages verbalize and interact."""
    verbalize: dict[str, Any] = field(default_factory=dict)
    """Overrides for stage verbalize alone."""
    teacher: str = "teacher"
    student: str = "student"
    data: str = "train.jsonl"
    beams: int = 1
    scored: str | None = None
    """A base model to score instead of what the stages made."""

    @property
    def speaks(self) -> bool:
        """Whether interact uses trained verbalizers."""
        changes = self.interact or {}
        return (
            self.interact is not None
            and changes.get("interact.intermediate") != "none"
            and not changes.get("interact.headless")
        )


DEFAULT = Row("VLsI (the paper's default)")
TEACHER = Row("teacher", interact=None, sft=None, scored="teacher")
BEFORE = Row("student before", interact=None, sft=None, scored="student")
NO_LAYERS = {"interact.intermediate": "none"}


def steps_of(config: RunConfig) -> dict[str, int]:
    """Optimizer steps of each stage."""
    return {stage: config.stage_training(stage).max_steps for stage in ("verbalize", "interact", "sft")}


def _steps(stage: str, steps: float) -> dict[str, Any]:
    return {f"{stage}.training.max_steps": max(1, round(steps))}


def sft_alone(config: RunConfig, **changes) -> Row:
    """Control: all steps are sft's."""
    total = sum(steps_of(config).values())
    row = Row("control: sft alone", interact=None, sft={"sft.start_from": "base"} | _steps("sft", total))
    return replace(row, **changes)


def last_layer(config: RunConfig, **changes) -> Row:
    """Control: ordinary distillation of the last layer, then sft."""
    steps = steps_of(config)
    row = Row(
        "control: last-layer KL, sft", interact=NO_LAYERS | _steps("interact", steps["verbalize"] + steps["interact"])
    )
    return replace(row, **changes)


def controls(config: RunConfig) -> list[Row]:
    """What every table has besides its own rows."""
    return [TEACHER, BEFORE, sft_alone(config), last_layer(config)]


def table_4b(config: RunConfig) -> list[Row]:
    """With and without sft, greedy and beam."""
    return [
        replace(BEFORE, name="student before", paper=("Qwen2-VL-2B", "Qwen2-VL-7B")),
        Row("without sft", ("VLsI-2B, without sft", "VLsI-7B, without sft"), sft=None),
        Row("without sft, beam 5", ("VLsI-2B (Beam), without sft", "VLsI-7B (Beam), without sft"), sft=None, beams=5),
        replace(DEFAULT, paper=("VLsI-2B, with sft", "VLsI-7B, with sft")),
        Row("with sft, beam 5", beams=5),
    ]


def table_4c(config: RunConfig) -> list[Row]:
    """Share of the sft stage's steps, with and without VLsI before it."""
    steps = steps_of(config)["sft"]
    base = {"sft.start_from": "base"}
    return [
        replace(BEFORE, name="student before", paper=("Qwen2-VL-7B",)),
        Row("student, 50% of sft", ("Qwen2-VL-7B +50% sft",), interact=None, sft=base | _steps("sft", steps / 2)),
        Row("student, 100% of sft", ("Qwen2-VL-7B +100% sft",), interact=None, sft=base | _steps("sft", steps)),
        Row("VLsI without sft", ("VLsI-7B",), sft=None),
        Row("VLsI, 50% of sft", ("VLsI-7B +50% sft",), sft=_steps("sft", steps / 2)),
        replace(DEFAULT, paper=("VLsI-7B +100% sft",)),
    ]


def _operations(name: str, paper: tuple[str, ...] = (), headless: bool = False) -> Row:
    """A row of table 4d by its name, `intermediate / last`."""
    words = {"CE": "ce", "L2": "l2", "KLD": "kld", "-": "none"}
    intermediate, last = (words[word] for word in name.split(" / "))
    changes = {"interact.intermediate": intermediate, "interact.last": last}
    if headless:
        changes |= {"interact.headless": True, "verbalizer.residual": False}
        return Row(f"{name}, headless", paper or (f"{name}, headless",), changes)
    return Row(name, paper or (name,), changes)


def table_4d(config: RunConfig) -> list[Row]:
    """Operations of intermediate and last layers; the last five rows are appendix D's."""
    names = ("CE / -", "CE / CE", "CE / KLD", "L2 / KLD", "KLD / -", "KLD / CE")
    rows = [_operations(name) for name in names]
    rows.append(replace(DEFAULT, name="KLD / KLD (the paper's default)", paper=("KLD / KLD",)))
    rows += [_operations(name, headless=True) for name in ("L2 / -", "L2 / KLD", "L2 / L2")]
    return rows + [_operations(name) for name in ("- / L2", "- / KLD")]


def table_4e(config: RunConfig) -> list[Row]:
    """Matching strategies, from random to all of Algorithm 1."""
    off = {f"matching.{part}": False for part in ("search_range", "order_preservation", "adaptive_temperature")}
    multinomial = {"matching.strategy": "multinomial"}
    return [
        Row("random", ("Random Index",), {"matching.strategy": "random"}),
        Row("uniform", ("Uniform Index",), {"matching.strategy": "uniform"}),
        Row("bottom-1", ("Bottom-1 Index",), {"matching.strategy": "bottom"}),
        Row("bottom-3", ("Bottom-3 Index",), {"matching.strategy": "bottom", "matching.k": 3}),
        Row("multinomial", ("Multinomial Sampling",), multinomial | off),
        Row("+ search range", ("+Search Range",), multinomial | off | {"matching.search_range": True}),
        Row(
            "+ order preservation", ("+Order Preservation",),
            multinomial | {"matching.adaptive_temperature": False},
        ),
        replace(DEFAULT, name="+ adaptive temperature (the paper's default)", paper=("+Adaptive Temperature",)),
    ]  # fmt: skip


def table_4f(config: RunConfig) -> list[Row]:
    """The eight verbalizers."""
    names = {
        "decoder_x2": "Decoder×2", "decoder": "Decoder", "ffn_x2": "FFN×2", "ffn": "FFN",
        "verb_ffn_x2": "verb-FFN×2", "verb_ffn": "verb-FFN", "mlp_x2": "MLP×2", "mlp": "MLP",
    }  # fmt: skip
    rows = []
    for name, paper in names.items():
        changes = {"verbalizer.architecture": name}
        if name.startswith("decoder"):
            changes["verbalizer.residual"] = False  # it has its own
        row = Row(name, (paper,), verbalizer=changes)
        rows.append(
            replace(DEFAULT, name="verb_ffn (the paper's default)", paper=(paper,)) if name == "verb_ffn" else row
        )
    return rows


def figure_4(config: RunConfig) -> list[Row]:
    """Every teacher with every student. The figure's cells are not in the paper's text: only the order of sizes is."""
    rows = []
    for student in ("student_small", "student"):
        rows.append(replace(BEFORE, name=f"{student} before", scored=student))
        for teacher in ("teacher_small", "teacher"):
            row = Row(f"{teacher} -> {student}", teacher=teacher, student=student)
            rows.append(replace(DEFAULT, name=row.name) if row == replace(DEFAULT, name=row.name) else row)
        rows.append(sft_alone(config, name=f"control: sft alone, {student}", student=student))
    return rows + [replace(TEACHER, name="teacher_small", scored="teacher_small"), TEACHER]


def table_why(config: RunConfig) -> list[Row]:
    """On validation: rates, rank, verbalizers, temperature, weight, layers, shares of the steps, data, depth."""
    steps = steps_of(config)
    rate = config.stage_training("interact").learning_rate
    floor = {"interact.training.min_learning_rate": 1e-6}
    rows = [DEFAULT, sft_alone(config), last_layer(config), TEACHER, BEFORE]
    total = 3 * sum(steps.values())  # a step of sft has a third of the operations of VLsI's mean step
    equal = {"sft.start_from": "base"} | _steps("sft", total)
    rows.append(sft_alone(config, name="control: sft alone, 3 x the steps", sft=equal))
    for factor in (0.3, 3):
        rows.append(
            Row(
                f"interact: learning rate x {factor}",
                interact=floor | {"interact.training.learning_rate": rate * factor},
            )
        )
    rows.append(Row("LoRA of rank 16", interact={"lora.rank": 16, "lora.alpha": 16}))
    rows.append(Row("verbalize: 3 x the steps", verbalize=_steps("verbalize", 3 * steps["verbalize"])))
    for temperature in (2, 4):
        change = {"interact.temperature": temperature}
        rows.append(Row(f"temperature {temperature}", interact=change))
        rows.append(last_layer(config, name=f"last-layer KL, temperature {temperature}, sft",
                               interact=last_layer(config).interact | change))  # fmt: skip
    rows.append(Row("student's verbalizers learn in interact", interact={"interact.train_student_verbalizers": True}))
    half = steps["interact"] // 2
    rows.append(Row("half of interact's steps given to sft", interact=_steps("interact", half),
                    sft=_steps("sft", steps["sft"] + half)))  # fmt: skip
    for weight in (0.3, 0.1):
        rows.append(Row(f"intermediate weight {weight}", interact={"interact.intermediate_weight": weight}))
    rows.append(Row("target layers: the student's deepest alone", verbalizer={"student.layers": [3]}))
    for data, label in (("train_noisy.jsonl", "30% of the answers wrong"), ("train.jsonl#400", "400 rows of data")):
        rows.append(Row(f"{label}: VLsI", data=data))
        rows.append(sft_alone(config, name=f"{label}: sft alone", data=data))
        rows.append(last_layer(config, name=f"{label}: last-layer KL, sft", data=data))
    deep = {"student": "student_deep"}
    rows.append(replace(BEFORE, name="deeper student: before", scored="student_deep"))
    rows.append(Row("deeper student: VLsI", **deep))
    rows.append(sft_alone(config, name="deeper student: sft alone", **deep))
    rows.append(last_layer(config, name="deeper student: last-layer KL, sft", **deep))
    return rows


TABLES = {
    "4b": table_4b, "4c": table_4c, "4d": table_4d, "4e": table_4e, "4f": table_4f, "fig4": figure_4, "why": table_why,
}  # fmt: skip
PAPER = {
    "4b": ["table_4b"],
    "4c": ["table_4c"],
    "4d": ["table_4d", "table_4d_headless"],
    "4e": ["table_4e"],
    "4f": ["table_4f"],
}
"""Files of `vlsi_fast/paper` with the rows of a table."""


def rows_of_table(table: str, config: RunConfig) -> list[Row]:
    """A table's rows, then the controls that it does not have already."""
    rows = TABLES[table](config)
    names = {(row.interact is None and row.sft is None, row.scored) for row in rows}
    if table not in ("fig4", "why"):
        rows += [row for row in controls(config) if row.scored is None or (True, row.scored) not in names]
    return rows
