"""What the studies compare: rows, and how each is tuned.

A row trains the student in one of three ways (`arm`), with some overrides of `configs/study.yaml`:

| arm  | stages                                                                                        |
|------|-----------------------------------------------------------------------------------------------|
| vlsi | verbalize for a quarter of the steps, then interact                                           |
| last | interact with the KL of the last layer alone: ordinary distillation, no verbalizers. Where    |
|      | the teacher speaks the student's language, its last layer has one: verbalize as in vlsi       |
| sft  | sft on the same rows                                                                          |

Every row has the same tuning: each learning rate of its `rates` with each number of steps that its `budget` allows is
run with seed 0 and scored on the validation split; the best one (by F1, whose noise is smaller than that of exact sets)
is run with fresh seeds and scored on the test split. The rate is that of interact or sft; it ends at a thirtieth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

RATES = (1e-3, 2e-3, 5e-3, 1e-2)
"""2e-2 was tried for every arm of table main: nothing is learnt."""
STEPS = (100, 200, 400)
FULL = STEPS[-1]
COARSE = (2e-3, 5e-3, 1e-2)
"""For tables of many rows."""
SHORT = (100, 200)
"""Steps of the curves, whose points are many."""
FINE = (3e-3, 4.5e-3, 6.7e-3, 1e-2)
"""Factors of 1.5: for differences of a few points. All arms learn nothing at 2e-2."""
GENTLE = (1e-4, 3e-4, 1e-3, 3e-3)
"""For sft after interact."""
SFT_STEPS = (50, 100)
FLOOR = 1 / 30
LABELLED = "labels_300.jsonl"
ANSWERED = "answered.jsonl"
Setting = dict[str, float]
"""`rate` and `steps` of a row."""


@dataclass(frozen=True)
class Row:
    """One way to train the student."""

    name: str
    arm: str = "vlsi"
    """vlsi, last, sft; "" for a base model that is scored as it is."""
    budget: str | int = FULL
    """Steps: a number; "best": the best of `choices`; "operations": as many as cost what VLsI's `FULL` steps cost."""
    paper: tuple[str, ...] = ()
    """Rows of the paper's table that it stands for (several: their mean)."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Overrides for interact, or for sft of arm sft."""
    verbalizer: dict[str, Any] = field(default_factory=dict)
    """Overrides for stages verbalize and interact."""
    verbalize: dict[str, Any] = field(default_factory=dict)
    """Overrides for stage verbalize alone."""
    data: tuple[str, ...] = (LABELLED,)
    """Files of rows."""
    after: Row | None = None
    """Of arm sft: the row whose student it goes on with, at that row's own best setting."""
    like: Row | None = None
    """The row whose setting it takes: they differ in decoding alone."""
    teacher: str = "teacher"
    student: str = "student"
    beams: int = 1
    baseline: str = ""
    """Of arm last: another loss in place of the KL, `tokenizer_baselines.BaselineModule`'s `kind`."""
    scored: str | None = None
    """A base model to score instead of what the stages made."""
    rates: tuple[float, ...] = RATES
    choices: tuple[int, ...] = STEPS
    """Steps that budget "best" chooses from."""

    @property
    def speaks(self) -> bool:
        """Whether interact uses trained verbalizers."""
        return self.arm == "vlsi" and not self.changes.get("interact.headless")

    @property
    def translates(self) -> bool:
        """Whether the teacher's layers speak the student's language."""
        return self.verbalizer.get("verbalizer.language") == "student"

    def candidates(self, operations_steps: int | None = None) -> Iterator[Setting]:
        """What tuning tries.

        Args:
            operations_steps: steps that `budget: operations` stands for, once they are known.
        """
        steps = self.choices if self.budget == "best" else (self.budget,)
        if self.budget == "operations":
            steps = (operations_steps,)
        for count in steps:
            for rate in self.rates:
                yield {"rate": rate, "steps": count}


def training(stage: str, rate: float, steps: int) -> dict[str, Any]:
    """Overrides that set a stage's learning rate and steps."""
    return {
        f"{stage}.training.learning_rate": rate,
        f"{stage}.training.min_learning_rate": rate * FLOOR,
        f"{stage}.training.max_steps": max(1, steps),
    }


VLSI = Row("VLsI")
LAST = Row("last-layer KL", arm="last")
BOTTOM = Row("bottom-1", changes={"matching.strategy": "bottom"}, rates=COARSE)
"""Each student layer is matched to the one teacher layer of least KL."""
LAST_L2 = Row("last-layer L2", arm="last", changes={"interact.last": "l2"})
"""Squared differences of logits in place of the KL."""
BEST_SFT = Row("sft alone, its best steps", arm="sft", budget="best")
EQUAL_STEPS = Row("sft alone, equal steps", arm="sft")
EQUAL_OPERATIONS = Row("sft alone, equal operations", arm="sft", budget="operations")
TEACHER = Row("teacher", arm="", scored="teacher")
BEFORE = Row("student before", arm="", scored="student")


def controls() -> list[Row]:
    """What every table has beside its own rows."""
    return [TEACHER, BEFORE, BEST_SFT, EQUAL_STEPS, LAST]


def table_main() -> list[Row]:
    """Every arm at its best, at equal steps, at equal operations; pictures without labels."""
    both = (LABELLED, ANSWERED)
    unlabelled = [
        Row("VLsI, with the teacher's answers", data=both),
        Row("last-layer KL, with the teacher's answers", "last", data=both),
        Row("sft, with the teacher's answers", "sft", data=both),
        Row(f"sft, with the teacher's answers, {FULL // 2} steps", "sft", FULL // 2, data=both),
    ]
    return [VLSI, *controls(), EQUAL_OPERATIONS, *(replace(row, rates=COARSE) for row in unlabelled)]


def _three(label: str, **changes) -> list[Row]:
    """The three arms, each at its best number of steps, under one condition."""
    tuning = {"budget": "best", "choices": SHORT, "rates": COARSE}
    arms = {"VLsI": "vlsi", "last-layer KL": "last", "sft alone": "sft"}
    return [Row(f"{label}: {name}", arm, **tuning, **changes) for name, arm in arms.items()]


def table_labels() -> list[Row]:
    """Accuracy against the number of labels; `all` are the 2,500 pictures that there are."""
    rows = []
    for count in (30, 100, 300, 1000):
        rows += _three(f"{count} labels", data=(f"labels_{count}.jsonl",))
    return [*rows, *_three("2500 labels", data=("train.jsonl",))]


def table_wordings() -> list[Row]:
    """300 labels in one wording, in at most two at each place, in all: what part of it do the wordings make?"""
    rows = []
    for label, kind in (("one wording", "_plain"), ("two wordings", "_two"), ("all wordings", "")):
        rows += _three(label, data=(f"labels_300{kind}.jsonl",))
    return rows


def table_wrong() -> list[Row]:
    """300 labels of which a share is another picture's."""
    rows = []
    for percent in (0, 10, 30, 50):
        rows += _three(f"{percent}% wrong", data=(f"labels_300{f'_wrong{percent}' if percent else ''}.jsonl",))
    return rows


def table_operations() -> list[Row]:
    """Accuracy against operations: the same arms with fewer and more steps."""
    rows = []
    for steps in (50, 100, 200, 400, 800):
        rows += [Row(f"VLsI, {steps} steps", budget=steps), Row(f"last-layer KL, {steps} steps", "last", steps)]
    return rows + [Row(f"sft alone, {steps} steps", "sft", steps) for steps in (50, 100, 200, 400, 1600)]


def _then_sft(steps: int, after: Row = VLSI) -> Row:
    return Row(f"{after.name}, then {steps} steps of sft", "sft", steps, after=after, rates=GENTLE)


def table_4b() -> list[Row]:
    """With and without sft after interact, greedy and beam."""
    after = replace(_then_sft(SFT_STEPS[-1]), paper=("VLsI-2B, with sft", "VLsI-7B, with sft"))
    without = ("VLsI-2B (Beam), without sft", "VLsI-7B (Beam), without sft")
    return [
        replace(BEFORE, paper=("Qwen2-VL-2B", "Qwen2-VL-7B")),
        replace(VLSI, paper=("VLsI-2B, without sft", "VLsI-7B, without sft")),
        replace(VLSI, name="VLsI, beam 5", paper=without, beams=5, like=VLSI),
        after,
        replace(after, name=f"{after.name}, beam 5", paper=(), beams=5, like=after),
        *(row for row in controls() if row is not BEFORE),
    ]


def table_4c() -> list[Row]:
    """Share of the sft stage's steps, with and without VLsI before it."""
    half, whole = SFT_STEPS
    return [
        replace(BEFORE, paper=("Qwen2-VL-7B",)),
        Row(f"sft of {half} steps", "sft", half, ("Qwen2-VL-7B +50% sft",)),
        Row(f"sft of {whole} steps", "sft", whole, ("Qwen2-VL-7B +100% sft",)),
        replace(VLSI, paper=("VLsI-7B",)),
        replace(_then_sft(half), paper=("VLsI-7B +50% sft",)),
        replace(_then_sft(whole), paper=("VLsI-7B +100% sft",)),
        LAST,
        _then_sft(half, LAST),
        _then_sft(whole, LAST),
        BOTTOM,
        _then_sft(half, BOTTOM),
        LAST_L2,
        _then_sft(half, LAST_L2),
        TEACHER,
    ]


def _operations(name: str, headless: bool = False) -> Row:
    """A row of table 4d by its name, `intermediate / last`."""
    words = {"CE": "ce", "L2": "l2", "KLD": "kld", "-": "none"}
    intermediate, last = (words[word] for word in name.split(" / "))
    changes = {"interact.intermediate": intermediate, "interact.last": last}
    if headless:
        changes |= {"interact.headless": True, "verbalizer.residual": False}
        return Row(f"{name}, headless", paper=(f"{name}, headless",), changes=changes)
    return Row(name, paper=(name,), changes=changes)


def table_4d() -> list[Row]:
    """Operations of intermediate and last layers; the last five rows are appendix D's."""
    rows = [replace(VLSI, name="KLD / KLD (the paper's default)", paper=("KLD / KLD",))]
    rows += [_operations(name) for name in ("CE / -", "CE / CE", "CE / KLD", "L2 / KLD", "KLD / -", "KLD / CE")]
    rows += [_operations(name, headless=True) for name in ("L2 / -", "L2 / KLD", "L2 / L2")]
    rows.append(replace(LAST_L2, name="- / L2", paper=("- / L2",)))
    rows.append(replace(LAST, name="- / KLD (last-layer KL)", paper=("- / KLD",)))
    return [*rows, TEACHER, BEFORE, BEST_SFT, EQUAL_STEPS]


def table_4e() -> list[Row]:
    """Matching strategies, from random to all of Algorithm 1."""
    off = {f"matching.{part}": False for part in ("search_range", "order_preservation", "adaptive_temperature")}
    multinomial = {"matching.strategy": "multinomial"}
    rows = [
        Row("random", paper=("Random Index",), changes={"matching.strategy": "random"}),
        Row("uniform", paper=("Uniform Index",), changes={"matching.strategy": "uniform"}),
        replace(BOTTOM, paper=("Bottom-1 Index",)),
        Row("bottom-3", paper=("Bottom-3 Index",), changes={"matching.strategy": "bottom", "matching.k": 3}),
        Row("multinomial", paper=("Multinomial Sampling",), changes=multinomial | off),
        Row("+ search range", paper=("+Search Range",), changes=multinomial | off | {"matching.search_range": True}),
        Row(
            "+ order preservation",
            paper=("+Order Preservation",),
            changes=multinomial | {"matching.adaptive_temperature": False},
        ),
        replace(VLSI, name="+ adaptive temperature (the paper's default)", paper=("+Adaptive Temperature",)),
        Row("the layers that the student was cut from", verbalizer={"teacher.layers": [1, 3, 6]}),
    ]
    return [*(replace(row, rates=COARSE) for row in rows), *controls()]


def table_4f() -> list[Row]:
    """The eight verbalizers."""
    names = {
        "decoder_x2": "Decoder×2",
        "decoder": "Decoder",
        "ffn_x2": "FFN×2",
        "ffn": "FFN",
        "verb_ffn_x2": "verb-FFN×2",
        "verb_ffn": "verb-FFN",
        "mlp_x2": "MLP×2",
        "mlp": "MLP",
    }
    rows = []
    for name, paper in names.items():
        changes = {"verbalizer.architecture": name}
        if name.startswith("decoder"):
            changes["verbalizer.residual"] = False  # it has its own
        row = Row(name, paper=(paper,), verbalizer=changes, rates=COARSE)
        default = replace(VLSI, name="verb_ffn (the paper's default)", paper=(paper,), rates=COARSE)
        rows.append(default if name == "verb_ffn" else row)
    return [*rows, *controls()]


def figure_4() -> list[Row]:
    """Every teacher with every student. The figure's cells are not in the paper's text: only the order of sizes is."""
    rows = []
    for student in ("student_small", "student"):
        rows.append(Row(f"{student} before", "", scored=student))
        for teacher in ("teacher_small", "teacher"):
            rows.append(Row(f"{teacher} -> {student}", teacher=teacher, student=student))
        rows.append(replace(BEST_SFT, name=f"{student}, sft alone", student=student))
    return rows + [Row("teacher_small", "", scored="teacher_small"), TEACHER]


def table_depth() -> list[Row]:
    """Do intermediate layers pay? Students cut to several depths, from teachers of several depths."""
    higher = (*RATES, 1.5e-2)  # in the deeper pairs VLsI is at its best with the highest of RATES
    pairs = (
        ("teacher", "student", RATES),
        ("teacher", "student_3", RATES),
        ("teacher", "student_2", RATES),
        ("teacher_12", "student_6_of_12", higher),
        ("teacher_16", "student_8_of_16", higher),
    )
    rows = []
    for teacher, student, rates in pairs:
        common = {"teacher": teacher, "student": student, "rates": rates}
        rows += [Row(f"{student}: VLsI", **common), Row(f"{student}: last-layer KL", "last", **common)]
        rows += [replace(BEST_SFT, name=f"{student}: sft alone", student=student)]
    return rows


def table_layers() -> list[Row]:
    """Do intermediate layers pay? What may help them, each at its own best rate of a finer grid, on validation."""
    own, both = {"verbalize.objective": "own_output"}, {"verbalize.objective": "both"}
    jsd = {"interact.divergence": "jsd"}
    deepest, thinned = {"student.layers": [3]}, {"student.layers": [2]}
    rows = [
        VLSI,
        replace(LAST, name="last-layer KL"),
        Row("verbalizers learn the model's own output", verbalize=own),
        Row("verbalizers learn both", verbalize=both),
        Row("verbalize for as long as interact", verbalize={"verbalize.training.max_steps": FULL - FULL // 4}),
        Row("the layers that the student was cut from", verbalizer={"teacher.layers": [1, 3, 6]}),
        Row("jsd", changes=jsd),
        replace(LAST, name="last layer alone, jsd", changes=jsd),
        replace(BOTTOM, name="bottom-1, jsd", changes=BOTTOM.changes | jsd),
        Row("reverse KL", changes={"interact.divergence": "reverse_kl"}),
        Row("temperature 2", changes={"interact.temperature": 2}),
        Row("last-layer KL, temperature 2", "last", changes={"interact.temperature": 2}),
        Row("intermediate weight 0.1", changes={"interact.intermediate_weight": 0.1}),
        Row("intermediate weight 0.3", changes={"interact.intermediate_weight": 0.3}),
        Row("intermediate weight, linear to 0", changes={"interact.intermediate_schedule": "linear"}),
        Row("the student's deepest target layer alone", verbalizer=deepest),
        Row("the student's middle target layer alone", verbalizer=thinned),
        Row("no order in matching: uniform", changes={"matching.strategy": "uniform"}),
        BOTTOM,
    ]
    return [replace(row, rates=FINE) for row in rows]


def table_promising() -> list[Row]:
    """What led on validation in table layers, or on test in 4d, and what it is compared with, on test."""
    names = (
        *("VLsI", "last-layer KL, temperature 2", "bottom-1", "intermediate weight 0.3"),
        *("the layers that the student was cut from", "jsd", "last layer alone, jsd", "bottom-1, jsd"),
    )
    rows = {row.name: row for row in table_layers()}
    default = replace(rows[LAST.name], name=f"{LAST.name} (default)")
    last_l2 = Row("VLsI, L2 at the last layer", changes=LAST_L2.changes)
    return [default, LAST_L2, last_l2, *(rows[name] for name in names)]


def table_tokenizers() -> list[Row]:
    """A teacher with another tokenizer than the student, against one with the same; translating verbalizers against
    its own words where both are possible; other losses across tokenizers."""
    tuning = {"budget": SHORT[-1], "rates": COARSE}
    own, translated = ("own words", {}), ("student's words", {"verbalizer.language": "student"})
    pairs = (
        ("the student's parent", "teacher", (own, translated)),
        ("same tokenizer", "teacher_same", (own, translated)),
        ("other tokenizer", "teacher_other", (translated,)),
    )
    rows = []
    for label, teacher, languages in pairs:
        for words, verbalizer in languages:
            for name, arm in (("VLsI", "vlsi"), ("last-layer KL", "last")):
                default = " (default)" if (teacher, verbalizer, arm) == ("teacher_same", {}, "last") else ""
                common = {"teacher": teacher, "verbalizer": verbalizer} | tuning
                rows.append(Row(f"{label}, {words}: {name}{default}", arm, **common))
    longer = {"verbalize.training.max_steps": tuning["budget"]}  # in place of a quarter of it
    for row in rows[-2:]:
        rows.append(replace(row, name=row.name.replace(":", ", longer verbalize:"), verbalize=longer))
    for name, kind in (("ULD and sft", "uld"), ("GOLD's hybrid and sft", "gold last ce")):
        rows.append(Row(f"other tokenizer: {name}", "last", teacher="teacher_other", baseline=kind, **tuning))
    rows.append(Row("sft alone", "sft", **tuning))
    return [*rows, *(Row(each, "", scored=each) for each in ("teacher", "teacher_same", "teacher_other", "student"))]


TABLES = {
    "main": table_main,
    "labels": table_labels,
    "wordings": table_wordings,
    "wrong": table_wrong,
    "operations": table_operations,
    "4b": table_4b,
    "4c": table_4c,
    "4d": table_4d,
    "4e": table_4e,
    "4f": table_4f,
    "fig4": figure_4,
    "depth": table_depth,
    "layers": table_layers,
    "promising": table_promising,
    "tokenizers": table_tokenizers,
}
TITLES = {
    "main": "300 labels, every arm at its own best rate",
    "labels": "number of labels",
    "wordings": "wordings of the labels",
    "wrong": "wrong labels",
    "operations": "operations",
    "4b": "use of the sft step",
    "4c": "share of the sft step",
    "4d": "operations of intermediate / last layers",
    "4e": "matching strategy",
    "4f": "verbalizer architecture",
    "fig4": "teacher -> student",
    "depth": "how many layers the student keeps",
    "layers": "what may make intermediate layers pay",
    "promising": "what may make intermediate layers pay, on unseen pictures",
    "tokenizers": "a teacher with another tokenizer",
}
PAPER = {
    "4b": ["table_4b"],
    "4c": ["table_4c"],
    "4d": ["table_4d", "table_4d_headless"],
    "4e": ["table_4e"],
    "4f": ["table_4f"],
}
"""Files of `vlsi_fast/paper` with the rows of a table."""


def models_of(rows: list[Row]) -> list[str]:
    """Names of the models that rows need."""
    return sorted({name for row in rows for name in (row.teacher, row.student, row.scored) if name})
