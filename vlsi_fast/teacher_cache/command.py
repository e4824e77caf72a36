"""`vlsi-fast teacher`: options in, and what is printed."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..config import ConfigError, load_config
from ..sizes import format_size
from .arguments import AHEAD


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run one command. Returns the exit code: 0, 1 (a cache is not what it should be), 2 (bad input)."""
    name = arguments.teacher_command
    if name in ("verify", "merge"):
        if overrides:
            raise ConfigError(f"teacher {name} reads no config and takes no {overrides[0]}; remove it")
        return _verify(arguments) if name == "verify" else _merge(arguments)
    config = load_config(arguments.config, overrides)
    try:
        return _build(config, arguments) if name == "build" else _check(config, arguments)
    except (ValueError, ImportError, FileNotFoundError) as error:  # of checkpoints and readers: all say what to do
        print(f"vlsi-fast: {error}", file=sys.stderr)
        return 2


def _build(config, arguments: argparse.Namespace) -> int:
    import torch

    from ..ranks.sharding import rank
    from ..ranks.watch import watch
    from .build import Chosen, build
    from .forms import DEFAULT

    if arguments.form == "hidden" and arguments.numbers is not None:
        raise ConfigError("--numbers is for --form targets; hidden states are kept as the model has them: remove it")
    if arguments.source is not None and arguments.rows is not None:
        raise ConfigError("--rows counts in the order of all sources, --source takes all rows of one: give one of them")
    chosen = Chosen(
        arguments.out,
        arguments.form,
        arguments.numbers or DEFAULT,
        arguments.layers,
        arguments.split,
        arguments.source,
        arguments.rows,
        arguments.shard_size,
        follow=_follow(arguments),
    )
    watch.place = "teacher build"
    watch.begin()
    try:
        manifest = build(config, chosen)
    finally:
        watch.end()
    if rank() == 0:
        print(json.dumps(manifest, indent=2) if arguments.json else _told(manifest, arguments.out or config.cache_dir))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _follow(arguments: argparse.Namespace):
    """What --follow and its options ask for."""
    from .following import Follow

    asked = {
        "--ahead": arguments.ahead is not None,
        "--keep": arguments.keep,
        "--students": arguments.students is not None,
    }
    if not arguments.follow:
        for name, given in asked.items():
            if given:
                raise ConfigError(f"{name} is for --follow: give that as well, or remove {name}")
        return None
    other = {"--rows": arguments.rows, "--source": arguments.source, "--split eval": arguments.split == "eval"}
    for name, given in other.items():
        if given:
            raise ConfigError(f"--follow makes the rows that stage interact reads, as it comes to them: remove {name}")
    return Follow(arguments.ahead or AHEAD, arguments.keep, arguments.students or 1)


def _told(manifest: dict[str, Any], folder) -> str:
    """What was built, for a reader."""
    identity, counts, errors = manifest["identity"], manifest["counts"], manifest["errors"]
    kept = f"layers {', '.join(map(str, identity['layers']))}" if identity["layers"] else "no target layers"
    lines = [
        f"{folder}: {counts['rows']} rows, {counts['tokens']} answer tokens, {format_size(counts['bytes'])} in "
        f"{counts['shards']} shards",
        f"  {identity['form']} in {identity['numbers']} of {manifest['teacher']['path']}: {kept}"
        + (" and the last layer" if identity["has_last"] else ""),
    ]
    if counts["refused"]:
        lines.append(f"  {counts['refused']} rows cannot be used; a run that reads them is told why")
    if errors:
        lines.append(
            f"  rounding costs {errors['kl_mean']:.1e} nats a token on average, {errors['kl_max']:.1e} at most, and "
            f"{errors['gradient']:.2%} of the gradient ({errors['tokens']} tokens, a student that knows nothing)"
        )
    if "ahead" in manifest:
        ahead = manifest["ahead"]
        lines.append(
            f"  never more than {ahead['most_ahead']} rows ahead of the last run that read it, and "
            f"{format_size(ahead['most_bytes'])} of shards to be deleted at once"
        )
    if counts["rows"]:
        lines.append(f"  to train from it: --teacher.mode cached --teacher.cache {folder}")
    return "\n".join(lines)


def _check(config, arguments: argparse.Namespace) -> int:
    from .checking import check

    found = check(config, arguments.rows, arguments.cache)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        bounds = found["bounds"]
        print(f"{found['rows']} rows, {found['tokens']} answer tokens, compared with the teacher itself:")
        print(f"  KL of layer pairs: off by {found['kl']:.1e} nats at most (bound {bounds['kl']:.0e})")
        print(f"  gradient: off by {found['gradient']:.1e} of its size (bound {bounds['gradient']:.0e})")
        if found["self_kl"] is not None:
            print(f"  KL(teacher || teacher): {found['self_kl']:.1e} nats")
        print("passed" if found["passed"] else "FAILED: build the cache anew, and see `vlsi-fast teacher verify`")
    return 0 if found["passed"] else 1


def _verify(arguments: argparse.Namespace) -> int:
    from .verifying import verify_main

    return verify_main(arguments.cache, arguments.quick, arguments.json)


def _merge(arguments: argparse.Namespace) -> int:
    from .verifying import merge

    manifest = merge(arguments.caches, arguments.out)
    print(json.dumps(manifest, indent=2) if arguments.json else _told(manifest, arguments.out))
    return 0
