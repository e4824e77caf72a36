"""Config files: reading YAML, what a file `extends`, and overrides from the command line. Meaning is `config.py`'s."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the field and the fix."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2; PyYAML's 1.1 reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_tree(path: Path, below: tuple[Path, ...] = ()) -> dict:
    """A YAML file with the files that it extends under it.

    Args:
        path: the file.
        below: files that extend it, outermost first.
    """
    if not path.is_file():
        extended = f" (extends, in {below[-1]}; relative to that file)" if below else "; see configs/ for examples"
        raise FileNotFoundError(f"config file {path} does not exist{extended}")
    if path.resolve() in [file.resolve() for file in below]:
        chain = " -> ".join(str(file) for file in (*below, path))
        raise ConfigError(f"extends goes in a circle: {chain}; remove one extends")
    try:
        tree = yaml.load(path.read_text(), _Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
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
        try:
            values[name] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{name}: cannot read {value!r} as YAML: {error}") from None
        i += 1
    return values
