"""`vlsi-fast data answer`: options in, and what is printed."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from ...config import ConfigError, load_config
from .arguments import OPTIONS


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the command. Returns the exit code: 0, 1 (no answer was kept), 2 (bad input, or a taken --out)."""
    from .run import answer

    if overrides and not arguments.config:
        raise ConfigError(f"{overrides[0]} overrides an option of --config, which is not given; remove it")
    config = load_config(arguments.config, overrides) if arguments.config else None
    options = {name: getattr(arguments, name) for name in OPTIONS}
    manifest = answer(config, arguments.images, arguments.questions, arguments.out, **options)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(manifest, indent=1) if arguments.json else summary(manifest, arguments.out))
    return 0 if manifest["kept"] else 1


def summary(manifest: dict[str, Any], out: str) -> str:
    """What was made, for a reader."""
    import yaml

    from .filters import meaning

    teacher = manifest["teacher"]
    kept = f"{manifest['kept']} of {manifest['answers']} answers"
    lines = [f"{out}: {kept}, by {teacher['name']} ({teacher['digest'][:12]})"]
    for title, causes in (("rejected", manifest["rejected"]), ("could not be asked", manifest["unusable"])):
        lines += [f"  {title}: {count} {cause} ({meaning(cause)})" for cause, count in causes.items()]
    if manifest["rejected"] or manifest["unusable"]:
        lines.append(f"  listed in {out}.rejected.jsonl")
    if manifest["kept"]:
        text = yaml.safe_dump([manifest["source"]], sort_keys=False, allow_unicode=True, width=10**6)
        lines += ["To train on them, add to data.train:", *(f"    {line}" for line in text.splitlines())]
    else:
        lines.append("No answer was kept: loosen the filters, or look at the causes, and start again with --fresh")
    return "\n".join(lines)
