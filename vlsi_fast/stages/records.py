"""What a step says of itself: sums over micro-batches and ranks, the line of metrics.jsonl, the trackers' numbers."""

from __future__ import annotations

import math
import resource
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ranks.sharding import rank
from .module import StageModule

if TYPE_CHECKING:
    from .throughput import Throughput

PER_ROLE = ("student", "teacher")
"""Models whose tokens and images are counted, in this order."""
COUNTS = 9 + 2 * len(PER_ROLE)
"""Numbers of `counts_of`."""


def counts_of(facts: dict[str, Any]) -> Tensor:
    """What the host knows of a micro-batch and is summed over micro-batches and ranks, [COUNTS] float64."""
    lengths = [len(facts["ids"]), len(facts["skipped"]), facts["positions"], facts["padding"], *facts["answered"]]
    lengths.append(facts["unaligned"])
    lengths += [facts[name].get(role, 0) for name in ("role_tokens", "pixel_values") for role in PER_ROLE]
    return torch.tensor([facts["answer_tokens"], facts["tokens"], *lengths], dtype=torch.float64)


def sums_of(module: StageModule, output: dict[str, Tensor], facts: dict[str, Any]) -> Tensor:
    """What the device knows of a micro-batch and is summed likewise, as one float64 vector there."""
    n = facts["answer_tokens"]
    pieces = [output["parts"] * n]
    if module.matrix_shape is not None:
        pieces += [output["kl"].flatten() * n, output["matches"].flatten()]
    if "teacher_tokens" in output:
        pieces.append(output["teacher_tokens"])
    return torch.cat([piece.double() for piece in pieces])


def own_numbers(waited: float, ranks: int, device: torch.device) -> Tensor:
    """What follows the sums, [1 + 2 ranks] float64 to add over ranks: seconds waited for data, each rank's peaks."""
    peaks = torch.zeros(2, ranks, dtype=torch.float64)
    peaks[:, rank()] = torch.tensor([peak_memory_bytes(device), peak_rss_bytes()], dtype=torch.float64)
    return torch.cat([torch.tensor([waited], dtype=torch.float64), peaks.flatten()])


def step_record(
    module: StageModule,
    values: list[float],
    ranks: int,
    *,
    stage: str,
    step: int,
    learning_rate: float,
    seconds: float,
    throughput: Throughput | None = None,
) -> dict[str, Any]:
    """A line of metrics.jsonl from `counts_of`, `sums_of` and `own_numbers`, added over micro-batches and ranks."""
    counts = (int(v) for v in values[:COUNTS])
    answer_tokens, tokens, rows, skipped, positions, padding, answered_rows, answered_tokens, *counts = counts
    unaligned_tokens, *per_role = counts
    n, names = max(answer_tokens, 1), module.part_names
    parts = [v / n for v in values[COUNTS : COUNTS + len(names)]]
    record = {
        "stage": stage,
        "step": step,
        "loss": sum(parts),
        **{f"loss/{name}": value for name, value in zip(names, parts)},
        "learning_rate": learning_rate,
        "answer_tokens": answer_tokens,
        "rows": rows,
        "answered_rows": answered_rows,
        "answered_tokens": answered_tokens,
        "unaligned_tokens": unaligned_tokens,
        "skipped_rows": skipped,
        "padding_share": padding / max(positions, 1),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "answer_tokens_per_second": answer_tokens / seconds,
    }
    if throughput is not None:
        roles = len(PER_ROLE)
        record |= throughput.of(seconds, rows, answer_tokens, per_role[:roles], per_role[roles:])
    if module.matrix_shape is not None:
        s, l = module.matrix_shape
        start = COUNTS + len(names)
        kl = [[v / n for v in values[start + i * l : start + (i + 1) * l]] for i in range(s)]
        start += s * l
        matches = [[int(v) for v in values[start + i * l : start + (i + 1) * l]] for i in range(s)]
        students, teachers = module.layer_names
        if module.teacher_names:  # each teacher's KLs over its own tokens
            start += s * l
            counts = [int(v) for v in values[start : start + len(module.teacher_names)]]
            columns = [i for i, width in enumerate(module.teacher_widths) for _ in range(width)]
            kl = [[v * n / max(counts[i], 1) for v, i in zip(row, columns)] for row in kl]
            record |= {"teachers": [module.teacher_names[i] for i in columns]}
            record |= {"teacher_tokens": dict(zip(module.teacher_names, counts))}
        record |= {"kl": kl, "matches": matches, "student_layers": students, "teacher_layers": teachers}
    waited, *peaks = values[-2 * ranks - 1 :]
    # Ranks meet in the sums just made, so a step is equally long on all of them: only the wait differs.
    record["data_wait_share"] = waited / ranks / seconds
    peaks = [int(v) for v in peaks]
    record["peak_memory_bytes"], record["peak_rss_bytes"] = peaks[:ranks], peaks[ranks:]
    return record


def non_finite(module: StageModule, pending: list[tuple[Tensor, dict[str, Any]]]) -> list[str]:
    """A line for each micro-batch of this rank, given as (`sums_of`, facts), that has numbers which are not finite."""
    names = module.part_names
    seen = []
    for micro, (sums, facts) in enumerate(pending):
        bad = [name for name, v in zip(names, sums[: len(names)].tolist()) if not math.isfinite(v)]
        if bad or not bool(torch.isfinite(sums).all()):
            seen.append(f"rank {rank()}, micro-batch {micro}: {', '.join(bad) or 'KL matrix'}; rows {facts['ids']}")
    return seen


def tracker_scalars(record: dict[str, Any]) -> dict[str, float]:
    """A step's record as the flat numbers that trackers take, beyond what the Trainer logs itself."""
    scalars = {k: float(v) for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step", "loss")}
    del scalars["learning_rate"]
    teachers = record.get("teacher_layers", [])
    names = [f"{name}_" for name in record["teachers"]] if "teachers" in record else [""] * len(teachers)
    for i, student in enumerate(record.get("student_layers", [])):
        for name in dict.fromkeys(names):
            own = [(record["matches"][i][j], k) for j, k in enumerate(teachers) if names[j] == name]
            mean = sum(count * k for count, k in own) / max(sum(count for count, _ in own), 1)
            scalars[f"matched_teacher_layer/{name}student_{student}"] = mean
        for j, teacher in enumerate(teachers):
            scalars[f"kl/student_{student}/{names[j]}teacher_{teacher}"] = record["kl"][i][j]
    for name in ("peak_memory_bytes", "peak_rss_bytes"):
        scalars[name] = float(max(record[name]))
    return scalars


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of the stage on a GPU; on the CPU `peak_rss_bytes`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since its start (earlier stages of the same process included)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
