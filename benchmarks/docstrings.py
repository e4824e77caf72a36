"""Real open text that every machine has: functions of installed libraries and what their docstrings say of them.

A row asks what a function does, showing its signature and first statements, and is answered by the first paragraph of
its docstring. Files are parsed, never imported. The functions of one file are in one split alone, and no docstring is
in two rows, so none of test or validation has been seen in training.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import platform
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("numpy", "scipy", "torch", "transformers", "pandas", "networkx", "sympy", "matplotlib")
"""Beside the standard library; those that are not installed are left out. The project's dependencies bring most."""
SPLITS = {"train": 0.8, "validation": 0.08, "test": 0.12}
"""Share of the files."""
HEAD = 128
"""Characters of signature and first statements that a question shows; a longer signature is no row."""
ANSWER = (32, 120)
"""Fewest and most characters of an answer."""


def write(folder: Path, sizes: dict[str, int], seed: int = 0) -> dict:
    """Write `<split>.jsonl` of each split and `manifest.json`.

    Args:
        folder: made where it is missing.
        sizes: rows of each split; every package gets about the same number of them, as far as it has so many.
        seed: of the draw.

    Returns:
        The manifest: packages with their versions and rows found, rows and sha256 of each split.

    Raises:
        ValueError: the libraries have too few functions with docstrings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pools: dict[str, dict[str, list[dict]]] = {split: {} for split in SPLITS}
    seen: set[str] = set()
    found = {}
    for package, root in roots().items():
        rows = [row for row in _rows(package, root) if not (row["key"] in seen or seen.add(row["key"]))]
        found[package] = {"version": _version(package), "rows": len(rows)}
        for row in rows:
            pools[_split(row["module"])].setdefault(package, []).append(row)
    manifest = {"seed": seed, "packages": found, "splits": {}}
    for split, pool in pools.items():
        drawn = _draw(pool, sizes[split], random.Random(f"{seed} {split}"))
        if len(drawn) < sizes[split]:
            raise ValueError(
                f"{split}: {len(drawn)} functions with a docstring are left of {', '.join(found)}, {sizes[split]} are "
                "asked for; install more of docstrings.PACKAGES or ask for fewer"
            )
        text = "".join(json.dumps(_messages(row)) + "\n" for row in drawn)
        (folder / f"{split}.jsonl").write_text(text)
        manifest["splits"][split] = {"rows": len(drawn), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def roots() -> dict[str, Path]:
    """Package -> its folder, "python" being the standard library; nothing is imported."""
    found = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            found[package] = Path(spec.origin).parent
    return found


def _version(package: str) -> str:
    if package == "python":
        return platform.python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _rows(package: str, root: Path) -> Iterator[dict]:
    """Every usable function below `root`, in the order of the files' names."""
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        if {"tests", "test", "testing", "site-packages", "_vendor", "idlelib"} & set(place.parts):
            continue
        parts = [p for p in place.with_suffix("").parts if p != "__init__"]
        module = ".".join(parts if package == "python" else [package, *parts])
        try:
            source = file.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes of others' sources
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                row = _row(node, module)
                if row is not None:
                    yield row


def _row(node: ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> dict | None:
    answer = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0].split())
    if not ANSWER[0] <= len(answer) <= ANSWER[1] or not usable(answer) or not answer[0].isupper() or answer[-1] != ".":
        return None
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    head = f"{kind} {node.name}({ast.unparse(node.args)}):"
    for statement in node.body[1:]:
        longer = f"{head}\n" + "\n".join("    " + line for line in ast.unparse(statement).splitlines())
        if len(longer) > HEAD:
            break
        head = longer
    if len(head) > HEAD or not usable(head):
        return None
    return {"module": module, "head": head, "answer": answer, "key": re.sub(r"\W+", "", answer.lower())}


def usable(text: str) -> bool:
    """Plain ASCII without anything that a chat format reads as its own (`<|im_end|>`, `<image>`)."""
    return text.isascii() and not re.search(r"<\|?[a-z_]+\|?>", text)


def _split(module: str) -> str:
    """The split that all functions of a file belong to."""
    share = int(hashlib.sha256(module.encode()).hexdigest()[:8], 16) / 16**8
    for split, size in SPLITS.items():
        share -= size
        if share < 0:
            return split
    return "train"  # rounding


def _draw(pool: dict[str, list[dict]], count: int, rng: random.Random) -> list[dict]:
    """`count` rows, one of each package in turn while it has some, in random order."""
    waiting = {package: rng.sample(rows, len(rows)) for package, rows in sorted(pool.items())}
    drawn: list[dict] = []
    while len(drawn) < count and any(waiting.values()):
        for rows in waiting.values():
            if rows and len(drawn) < count:
                drawn.append(rows.pop())
    rng.shuffle(drawn)
    return drawn


def _messages(row: dict) -> dict:
    question = f"What does this function of {row['module']} do?\n\n{row['head']}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["answer"]}]
    return {"messages": turns, "type": row["module"].partition(".")[0]}
