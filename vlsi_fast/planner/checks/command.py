"""The table of checks, and who runs it: `vlsi-fast check` all, a stage at its start those of `AT_START`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ...config import ConfigError, RunConfig, load_config
from ...ranks.sharding import rank
from ...terminal import say
from .cache import check_cache
from .data import check_alignment, check_data
from .device import look_at_device
from .machine import check_disk, check_memory, check_self_kl
from .models import check_heads, check_images, check_models, check_sizes, check_templates, check_tokens
from .subject import FAILURE, NOTICE, PASS, UNCHECKED, Failed, Notice, Result, Subject, Unchecked

CACHE = "teacher's cache"
CHECKS: dict[str, Callable[[Subject], str]] = {
    "models": check_models,
    "model sizes": check_sizes,
    "tokenizers": check_tokens,
    "head rows": check_heads,
    "chat templates": check_templates,
    "image tokens": check_images,
    "data": check_data,
    "answer alignment": check_alignment,
    CACHE: check_cache,
    "disk space": check_disk,
    "GPU memory": check_memory,
    "KL self-check": check_self_kl,
}
AT_START = ("model sizes", "head rows", "image tokens", CACHE, "disk space", "GPU memory")
"""What a stage looks at beyond what it checks itself (models, tokenizers, sources; each row as it is read)."""


class PreflightError(ConfigError):
    """A run that cannot go well; the message is the table."""


def look(subject: Subject, names: tuple[str, ...] = tuple(CHECKS)) -> list[Result]:
    """Run checks, each whatever became of the others; that of a cache only where a stage reads one."""
    results = []
    for name in names:
        if name == CACHE and not subject.reads_cache:
            continue
        try:
            results.append(Result(name, PASS, CHECKS[name](subject)))
        except Failed as error:
            results.append(Result(name, FAILURE, error.detail, error.fix))
        except Notice as error:
            results.append(Result(name, NOTICE, str(error)))
        except Unchecked as error:
            results.append(Result(name, UNCHECKED, str(error)))
        except Exception as error:  # what a check did not foresee is a failure of its own, not of the others
            fix = "see the message; if it is unclear, report it"
            results.append(Result(name, FAILURE, f"{type(error).__name__}: {error}", fix))
    return results


def failed(results: list[Result]) -> bool:
    """Whether any check failed."""
    return any(result.status == FAILURE for result in results)


def as_text(results: list[Result]) -> str:
    """The table as plain text, as wide as the terminal."""
    from rich.table import Table
    from rich.text import Text

    from ...tabular import text_of

    table = Table("check", "result", "found; fix")
    for result in results:
        found = result.detail + (f"\nfix: {result.fix}" if result.fix else "")
        table.add_row(result.name, result.status, Text(found))
    return text_of(table)


def require_ready(config: RunConfig, stage: str, roles: dict[str, Any], ranks: int) -> None:
    """The cheap checks at the start of a stage, on the configs and processors that it has read (student alone: the
    teacher's are not looked for).

    Raises:
        PreflightError: some check failed; the message is the table.
    """
    subject = Subject(config, (stage,), ranks=ranks, roles=tuple(roles))
    for name, role in roles.items():
        subject.found[name, "config"], subject.found[name, "processor"] = role.config, role.processor
    results = look(subject, AT_START)
    for result in results:
        if (result.name, result.status) == ("model sizes", NOTICE) and rank() == 0:
            say(result.detail)
    if failed(results):
        raise PreflightError(f"stage {stage} cannot start (preflight: false goes past this):\n{as_text(results)}")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`vlsi-fast check`. Returns the exit code: 1 where a check failed."""
    config = load_config(arguments.config, overrides)
    if arguments.dry_run:
        from ..dry_run.command import main as dry_run

        return dry_run(config, arguments)
    if arguments.rows < 1:
        raise ConfigError("--rows must be at least 1")
    ranks = max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 1
    subject = Subject(config, tuple(config.stages), rows=arguments.rows, ranks=ranks)
    results = look(subject)
    if arguments.device:
        results += look_at_device(subject)
    print(json.dumps([asdict(r) for r in results], indent=2) if arguments.json else as_text(results))
    return 1 if failed(results) else 0
