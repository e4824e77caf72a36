"""The model card of an export: metadata by huggingface_hub, text in card.md, numbers from the run's own records.

Nothing is invented: what the run does not know, licences above all, is left to fill in, and a notice says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..runs import Run
from ..shrinking.record import describe, read_shrink_record
from ..sizes import format_count, format_size
from .checkpoint import Written
from .scores import THIS, Score, source_label, summary_scores

FILL = "**[to be filled in]**"
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
TEMPLATE = Path(__file__).with_name("card.md")
OBJECTIVES = {
    "answers": "cross-entropy of the answers",
    "own_output": "KL from the model's own last layer",
    "both": "cross-entropy of the answers and KL from the model's own last layer",
}


@dataclass(frozen=True)
class Choices:
    """What the user says for the card."""

    title: str
    license: str | None = None
    base_model: str | None = None
    teacher_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


@dataclass(frozen=True)
class Parent:
    """One of the models that the export comes from."""

    role: str
    label: str
    """For readers: its Hub name, or its folder's."""
    hub_id: str | None
    license: dict[str, str]
    """License fields of its own model card; empty where there is none."""


def make_card(run: Run, stage: str, written: Written, choices: Choices) -> tuple[ModelCard, list[str]]:
    """The card, and what its reader should know is missing from it.

    Args:
        run: the run.
        stage: whose student was exported.
        written: what was written.
        choices: what the user says.
    """
    stages = run.stages_behind(stage)
    parents = _parents(run, stages, choices)
    asked, summary = summary_scores(run) if run.student.parent.name == stage else ("", [])
    license, notices = _license(choices, parents[0])
    for parent in parents:
        if parent.hub_id is None:
            flag = {"student": "--base-model", "teacher": "--teacher-model"}[parent.role]
            notices.append(f"the {parent.role} is a folder ({parent.label}): name its Hub model with {flag}")
    if not choices.datasets:
        notices.append("the card's metadata name no data set: --datasets takes their names on the Hub")
    scores = _eval_results(choices, run, summary)
    data = ModelCardData(
        **license,
        base_model=[parent.hub_id for parent in parents if parent.hub_id] or None,
        datasets=choices.datasets or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["vlsi-fast", "vision-language", *(["distillation", "vlsi"] if len(parents) == 2 else ["sft"])],
        eval_results=scores or None,
        model_name=choices.title if scores else None,  # of the model-index
        **({"base_model_relation": "finetune"} if any(parent.hub_id for parent in parents) else {}),
    )
    record = run.records[stage]
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=choices.title,
        student=f"`{parents[0].label}`",
        by=f"from `{parents[1].label}`" if len(parents) == 2 else "from no teacher (fine-tuned)",
        distilled=len(parents) == 2,
        shrunk=_shrunk(run, stage),
        version=__version__,
        architecture=written.architecture,
        parameters=format_count(written.parameters),
        dtype=written.dtype,
        transformers=record["versions"].get("transformers"),
        stages=_stages(run, stages),
        memory=" ".join(["Memory is the largest peak of one rank.", *_elsewhere(run, stages)]),
        tuned="sft" in stages,
        settings=_settings(run, stages, stage),
        versions=", ".join(f"{name} {value}" for name, value in record["versions"].items() if value != "absent"),
        commit=f"commit {record['commit']}" if record.get("commit") else "commit unknown",
        data=_data(record),
        results=_results(asked, summary, choices.scores),
        licences=_licences(license, parents),
        fill=FILL,
    )
    return card, notices


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---- parents and licences ----


def _parents(run: Run, stages: list[str], choices: Choices) -> list[Parent]:
    parents = []
    for role, given in (("student", choices.base_model), ("teacher", choices.teacher_model)):
        record = next((run.records[name] for name in reversed(stages) if role in run.records[name]["facts"]), None)
        if record is None or (role == "teacher" and "interact" not in stages):
            continue
        named, folder = record["config"][role]["path"], Path(record["facts"][role]["path"])
        # a Hub name was resolved to a folder of the cache, a folder to itself
        is_hub_name = HUB_NAME.fullmatch(named) and Path(named) != folder
        hub_id = given or (named if is_hub_name else None)
        parents.append(Parent(role, hub_id or folder.name, hub_id, license_of(folder)))
    return parents


def license_of(folder: Path) -> dict[str, str]:
    """The license fields of a checkpoint's own card."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except ValueError:
        return {}
    found = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in found.items() if isinstance(value, str)} if found["license"] else {}


def _shrunk(run: Run, stage: str) -> str:
    """What the student was made from before any training; empty for a model of its own."""
    for folder in (run.student_of(stage), run.base("student")):
        record = read_shrink_record(folder) if Path(folder).is_dir() else None
        if record is not None:
            return describe(record)
    return ""


def _license(choices: Choices, student: Parent) -> tuple[dict[str, str], list[str]]:
    """License fields of the export, and notices."""
    if choices.license:
        return {"license": choices.license}, []
    if student.license:
        said = student.license.get("license_name", student.license["license"])
        return student.license, [f"licence {said} taken from the student's card: see what teacher and data ask for"]
    return {"license": "other"}, ["no licence is known: give --license, or fill in the card's licence lines"]


def _licences(license: dict[str, str], parents: list[Parent]) -> str:
    def say(fields: dict[str, str], source: str) -> str:
        name = fields.get("license_name", fields.get("license"))
        if name in (None, "other"):
            return FILL
        return f"{name}{source}" + (f", {fields['license_link']}" if "license_link" in fields else "")

    lines = [f"- This model: {say(license, '')}"]
    for parent in parents:
        lines.append(f"- {parent.role.title()}, `{parent.label}`: {say(parent.license, ' (its model card)')}")
    return "\n".join([*lines, f"- Training data: {FILL}, for each source"])


# ---- how it was made ----


def _stages(run: Run, stages: list[str]) -> str:
    rows = []
    for name in stages:
        record, summary = run.records[name], run.records[name].get("summary", {})
        peak = max((max(step.get("peak_memory_bytes") or [0]) for step in run.metrics(name)), default=0)
        where = f"{record['world_size']} x {summary.get('device', '?').split(':')[0]}"
        counts = [summary.get(key, "?") for key in ("optimizer_steps", "rows", "answer_tokens")]
        seconds = f"{summary['seconds']:.0f}" if "seconds" in summary else "?"
        rows.append([name, _what(record), *counts, where, seconds, format_size(peak) if peak else "?"])
    header = ["stage", "what was trained", "optimizer steps", "rows", "answer tokens", "ranks", "seconds", "memory"]
    return table(header, rows)


def _what(record: dict[str, Any]) -> str:
    """What a stage trains, and by which loss."""
    config, name = record["config"], record["stage"]
    lora = f"LoRA (rank {config['lora']['rank']}, alpha {config['lora']['alpha']:g})"
    if name == "verbalize":
        objective = OBJECTIVES[config["verbalize"].get("objective", "answers")]
        return f"verbalizers of {' and '.join(config['verbalize']['models'])}: {objective}"
    if name == "interact":
        losses = config["interact"]
        kind = losses.get("divergence", "forward_kl")
        kind = f"jsd (beta {losses['jsd_beta']:g})" if kind == "jsd" else kind
        names = {} if kind == "forward_kl" else {"kld": kind}
        layers, last = (names.get(losses[place], losses[place]) for place in ("intermediate", "last"))
        course = losses.get("intermediate_schedule", "constant")
        fading = "" if course == "constant" else f" (fading out, {course})"
        return f"{lora} on the student: {layers} at target layers{fading}, {last} at the last layer"
    parts = "language model and vision tower" if config["sft"]["train_vision"] else "language model"
    return f"{lora if config['sft']['method'] == 'lora' else parts}: cross-entropy of the answers"


def _elsewhere(run: Run, stages: list[str]) -> list[str]:
    """Verbalizers that another run trained."""
    if "interact" not in stages:
        return []
    config = run.records["interact"]["config"]
    named = [role for role in ("student", "teacher") if config[role].get("verbalizers")]
    return [f"The verbalizers of the {' and '.join(named)} were trained in another run."] if named else []


def _settings(run: Run, stages: list[str], stage: str) -> str:
    record, rows = run.records[stage], []
    for name in stages:
        identity = run.records[name]["identity"]
        training = identity["training"]
        end = f" to {training['min_learning_rate']:g}" if training["lr_scheduler_type"] == "cosine" else ""
        said = f"{training['optim']}, learning rate {training['learning_rate']:g}{end} ({training['lr_scheduler_type']}"
        said += f", {training['warmup_steps']} warm-up steps), weight decay {training['weight_decay']:g}, "
        rows.append([f"{name}: optimisation", said + f"{identity.get('rows_per_step', '?')} rows a step"])
    if "interact" in stages:
        config, facts = run.records["interact"]["config"], run.records["interact"]["facts"]
        for role, fact in facts.items():
            rows.append([f"target layers of the {role}", ", ".join(map(str, fact["layers"]))])
        if config["teacher"].get("mode") == "cached":
            rows.append(["what the teacher says", f"kept on disk, {facts['teacher'].get('targets', 'exact')}"])
        rows += [["verbalizers", _fields(config["verbalizer"])], ["layer matching", _fields(config["matching"])]]
    data = record["config"]["data"]
    bounds = [f"{name} {data[name]}" for name in ("min_pixels", "max_pixels") if data[name] is not None]
    rows.append(["rows", ", ".join([f"at most {data['max_length']} tokens", *bounds])])
    rows.append(["precision in training", f"{record['config']['dtype']}, a float32 copy of trained weights"])
    rows.append(["seed", record["config"]["seed"]])
    return table(["setting", "value"], rows)


def _fields(section: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in section.items())


def _data(record: dict[str, Any]) -> str:
    """Sources with their rows: those found, else those that the config expected."""
    found = record.get("sources")
    rows = []
    for i, source in enumerate(record["config"]["data"]["train"]):
        count = found[i][1] if found else source["count"] or "not recorded"
        rows.append([source_label(source), source["reader"], count, FILL])
    skipped = sum(record.get("summary", {}).get("skipped_rows", {}).values())
    text = table(["source", "format", "rows", "licence"], rows)
    summary = record.get("summary", {})
    if answered := summary.get("answered_rows"):
        share, tokens = answered / summary["rows"], summary["answered_tokens"] / max(summary["answer_tokens"], 1)
        text += (
            f"\n\nOf the {summary['rows']} rows read in the last stage, {answered} ({share:.0%}; {tokens:.0%} of the "
            "answer tokens) have answers that a model wrote (`vlsi-fast data answer`), not people."
        )
    return text + (f"\n\n{skipped} rows could not be used and were skipped in the last stage." if skipped else "")


# ---- results ----


def _results(asked: str, summary: list[tuple[str, float]], scores: list[Score]) -> str:
    blocks = []
    if summary:
        blocks.append(f"Exact match on {asked}:")
        blocks.append(table(["model", "exact match"], [[label, f"{100 * value:.2f}%"] for label, value in summary]))
    if scores:
        rows = [[s.model, s.name, s.metric, _percent(s.value), _interval(s), s.rows or ""] for s in scores]
        blocks.append(table(["model", "data", "metric", "value", "95% interval", "rows"], rows))
    return "\n\n".join(blocks) or f"{FILL}: no results were given (`vlsi-fast export --results FILE`)."


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%" if 0 <= value <= 1 else f"{value:.2f}"


def _interval(score: Score) -> str:
    return " to ".join(map(_percent, score.interval)) if score.interval else ""


def _eval_results(choices: Choices, run: Run, summary: list[tuple[str, float]]) -> list[EvalResult]:
    """Entries of the card's model-index: this model's, on whole benchmarks."""
    scores = [score for score in choices.scores if score.whole and score.model == THIS]
    name = ", ".join(map(source_label, run.config_tree["data"]["eval"]))
    scores += [Score(name, "exact_match", value) for label, value in summary if label == THIS]
    return [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=score.name,
            dataset_name=score.name,
            metric_type=score.metric,
            metric_value=score.value,
        )
        for score in scores
    ]
