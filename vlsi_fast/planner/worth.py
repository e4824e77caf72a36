"""What a cache of the teacher costs and saves, on paper: its bytes, the time to build it, and when that pays.

    build     the teacher's forward over the rows once, its verbalizers, and for targets 2 N V (d_l + d_s) a layer; its
              weights are gathered for every micro-batch, as `vlsi-fast teacher build` has no window
    pass      stage interact once over the rows: an epoch, or one more student with the same head
    it pays   from n passes on, where build + n passes from the cache < n passes with the teacher in the job

Reading from disk is not counted as time: `read_bytes_per_second` says what a machine's disk or network must give.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from ..teacher import mode_under
from ..teacher_cache.forms import NUMBERS
from .arguments import Machine
from .build import Models, setup_of, step_of, teacher_role
from .memory import RESERVE_BYTES
from .recalled import Recalled, caches_there, can_be_cached, recalled_of
from .speed import Speed, speed
from .walk import Step, walk
from .window import resolved_setup

if TYPE_CHECKING:
    from .report import Rows

CHOICES = (*(("targets", numbers) for numbers in NUMBERS), ("hidden", None))
"""Forms of a cache, and their numbers; None: the run's dtype."""


def worth_of_cache(models: Models, machine: Machine, rows: Rows, samples: int) -> dict[str, Any] | None:
    """A cache of `samples` rows, for stage interact on this machine; None where the run can have none.

    Returns:
        `folder` of the one on disk or None, `form` and `numbers` that interact would read, `layers` kept (the last one
        included), `answer_tokens` of all rows, `choices`: of each form `bytes` a row and in all, `build_days` and
        whether interact can read it (`serves`); `teacher`: `mode`, `fits`, `days` of a pass with the teacher in the
        job; `days` of a pass from the cache, `pays_from`: passes, for both bounds of the days, None: never;
        `read_bytes_per_second` of a machine.
    """
    config = models.config
    if not can_be_cached(config):
        return None
    micro, found = config.stage_training("interact").per_device_train_batch_size, recalled_of(models)
    setup = setup_of(config, "interact", machine.ranks, node=machine.gpus)
    live = mode_under(config.teacher.mode, setup.zero is not None)

    def in_mode(mode: str) -> tuple[Speed, bool]:
        here = dataclasses.replace(setup, teacher_mode=mode)
        here = resolved_setup(models, "interact", here, rows.batch(micro), machine.memory_bytes - RESERVE_BYTES)
        peak = walk(step_of(models, "interact", here, rows.batch(micro))).peak.total
        step = step_of(models, "interact", here, rows.batch(micro, mean=True))
        return speed(step, machine), peak <= machine.memory_bytes - RESERVE_BYTES

    needs_states = config.interact.reads_teacher_layers or config.interact.reads_teacher_last
    choices = []
    for form, numbers in CHOICES:
        one = found.as_form(form, numbers or config.dtype)
        built = speed(build_step(models, setup, rows.batch(micro, mean=True), one, live), machine)
        size = rows.mean_answers * one.token_bytes(one.kept)
        choices.append(
            {
                "form": form,
                "numbers": one.numbers,
                "row_bytes": size,
                "bytes": samples * size,
                "build_days": list(built.days(samples)),
                "serves": form == "hidden" or not needs_states,
            }
        )
    (taught, fits), (cached, _) = in_mode(live), in_mode("cached")
    build = next(c["build_days"] for c in choices if (c["form"], c["numbers"]) == (found.form, found.numbers))
    days, without = taught.days(samples), cached.days(samples)
    row = rows.mean_answers * found.token_bytes(found.kept)
    return {
        "folder": next((str(folder) for folder in caches_there(config)), None),
        "form": found.form,
        "numbers": found.numbers,
        "layers": found.kept,
        "answer_tokens": samples * rows.mean_answers,
        "choices": choices,
        "teacher": {"mode": live, "fits": fits, "days": list(days)},
        "days": list(without),
        "pays_from": [passes(*each) for each in zip(build, days, without)],
        "read_bytes_per_second": row * cached.samples / cached.hidden / machine.nodes,
    }


def passes(build: float, taught: float, cached: float) -> int | None:
    """The smallest whole n with build + n cached < n taught."""
    return math.floor(build / (taught - cached)) + 1 if taught > cached else None


def build_step(models: Models, setup, batch, found: Recalled, mode: str) -> Step:
    """A micro-batch of `vlsi-fast teacher build`, as far as its time goes."""
    setup = dataclasses.replace(setup, teacher_mode=mode, window=1, accumulation=1)
    roles = {"teacher": teacher_role(models, setup)}
    vocab = min(roles["teacher"].voice.vocab, models.shapes["student"].vocab)
    batches = {"teacher": batch(roles["teacher"].shape)}
    return Step("build", roles, batches, setup, vocab, models.config.interact, recalled=found)


# ---- tables ----


def cache_table(found: dict[str, Any], samples: int):
    """One line for each form."""
    from rich.table import Table

    from .report import DECIMAL_BYTES, _number, _span, _unit

    unit, size = _unit(max(each["bytes"] for each in found["choices"]), {"TB": 1e12} | DECIMAL_BYTES)
    of_row, row = _unit(max(each["row_bytes"] for each in found["choices"]), DECIMAL_BYTES)
    title = f"cache of {samples / 1e6:g}M rows, {found['layers']} layers"
    table = Table(title, f"{of_row} a row", f"{unit} in all", "hours to build on these GPUs", "")
    for each in found["choices"]:
        chosen = (each["form"], each["numbers"]) == (found["form"], found["numbers"])
        note = "" if each["serves"] else "not for this loss"
        if chosen:
            note = "on disk" if found["folder"] else "of this plan"
        table.add_row(
            f"{each['form']}, {each['numbers']}",
            _number(each["row_bytes"] / row),
            _number(each["bytes"] / size),
            _span(*(24 * days for days in each["build_days"])),
            note,
        )
    return table


def cache_lines(found: dict[str, Any]) -> list[str]:
    """When it pays, in words."""
    from .report import _span

    teacher, counts = found["teacher"], found["pays_from"]
    live = f"{_span(*teacher['days'])} days with the teacher in the job ({teacher['mode']}"
    live += ")" if teacher["fits"] else ", which does not fit)"
    said = f"one pass of interact over these rows: {_span(*found['days'])} days from the cache, {live}"
    if None in counts:
        return [said, "a cache saves no time here"]
    when = " to ".join(dict.fromkeys(map(str, sorted(counts))))
    whose = "students" if found["form"] == "hidden" else "students with this head"
    rate = found["read_bytes_per_second"] / 1e9
    return [
        said,
        f"building it pays from {when} passes on (epochs x {whose}); each machine reads at most {rate:.2g} GB/s of it",
    ]
