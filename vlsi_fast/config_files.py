"""Config files: reading YAML, what a file `extends`, and overrides from the command line. Meaning is `config.py`'s."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .sizes import format_size


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run. The message names the field and the fix."""


MAX_BYTES = 4 * 2**20
"""Of a config or mix file; PyYAML reads about a megabyte in ten seconds."""
MAX_VALUES, MAX_DEPTH = 100_000, 50
"""Values that a file may come to once its aliases are written out, and how deep they may be nested."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2; PyYAML's 1.1 reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigError: too large, not text, not YAML, or YAML that comes to more than `MAX_VALUES`.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(
            f"{path} has {format_size(size)}, a config has a few KiB: is it a file of rows? Those go into data.train"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text file in UTF-8 ({error}); give a YAML file") from None
    return parse_yaml(text, f"{path} is not valid YAML")


def parse_yaml(text: str, wrong: str) -> Any:
    """YAML text as mappings, lists and values.

    Aliases are counted before anything is made of them: nine nested lists of nine aliases each are 9^9 values.

    Args:
        text: one document.
        wrong: begins the message of every error.

    Raises:
        ConfigError: what is wrong with it.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, wrong)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{wrong}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{wrong}: nested deeper than {MAX_DEPTH}") from None
    except (ValueError, TypeError, OverflowError) as error:  # a date of month 13, a mapping as a key
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{wrong}: {error}") from None


def _count(node: yaml.Node, known: dict[int, tuple[int, int] | None], wrong: str) -> tuple[int, int]:
    """Values under a node with aliases written out, and their depth; `known`: of nodes seen, None while inside them."""
    if id(node) in known:
        if known[id(node)] is None:
            raise ConfigError(f"{wrong}: an alias stands inside of what it names; write the values out")
        return known[id(node)]
    known[id(node)] = None
    children = node.value if isinstance(node, yaml.SequenceNode) else ()
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    counts = [_count(child, known, wrong) for child in children]
    total, depth = 1 + sum(count for count, _ in counts), 1 + max((deep for _, deep in counts), default=0)
    if total > MAX_VALUES:
        raise ConfigError(f"{wrong}: its aliases come to more than {MAX_VALUES:,} values; write out what is meant")
    if depth > MAX_DEPTH:
        raise ConfigError(f"{wrong}: nested deeper than {MAX_DEPTH}")
    known[id(node)] = total, depth
    return total, depth


def read_tree(path: Path, below: tuple[Path, ...] = ()) -> dict:
    """A YAML file with the files that it extends under it.

    Args:
        path: the file.
        below: files that extend it, outermost first.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the YAML file of a run")
    if not path.is_file():
        extended = f" (extends, in {below[-1]}; relative to that file)" if below else "; see configs/ for examples"
        raise FileNotFoundError(f"config file {path} does not exist{extended}")
    if path.resolve() in [file.resolve() for file in below]:
        chain = " -> ".join(str(file) for file in (*below, path))
        raise ConfigError(f"extends goes in a circle: {chain}; remove one extends")
    tree = read_yaml(path) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of options, found {type(tree).__name__}")
    if "extends" not in tree:
        return tree
    base = tree.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must name one YAML file, found {base!r}")
    return _merge(read_tree(path.parent / base, (*below, path)), tree)


def _merge(base: dict, over: dict) -> dict:
    """`base` with `over` on top: sections are merged field by field; anything else, lists too, is replaced."""
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def apply_override(tree: dict, name: str, value: Any) -> None:
    """Set the dotted `name` in nested mappings and lists."""
    node, parts = tree, name.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"--{name}: {'.'.join(parts[:i])} is a list of {len(node)}; use an index below that")
            key: Any = int(part)
        elif isinstance(node, dict):
            key = part
            if not last and node.get(key) is None:
                node[key] = {}
        else:
            raise ConfigError(f"--{name}: {'.'.join(parts[:i])} is a single value, it has no field {part}")
        if last:
            node[key] = value
        else:
            node = node[key]


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`["--a.b", "1", "--c=x"]` -> `{"a.b": 1, "c": "x"}`; values are read as YAML."""
    values, i = {}, 0
    while i < len(arguments):
        name = arguments[i]
        if not name.startswith("--") or len(name) == 2:
            raise ConfigError(f"expected --field value, got {name!r}")
        name, equals, value = name[2:].partition("=")
        if not equals:
            i += 1
            if i == len(arguments) or arguments[i].startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name} VALUE")
            value = arguments[i]
        name = name.replace("-", "_")  # --output-dir is --output_dir: no option has a dash in its name
        values[name] = parse_yaml(value, f"--{name}: cannot read {value!r} as YAML")
        i += 1
    return values


def nearest(name: str, known) -> str:
    """'; did you mean X?' for the closest of `known`, or the list of them where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if len(known) <= 40 else ""
