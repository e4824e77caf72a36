"""MkDocs hooks: pages that are made from the code, and a check that no page loads anything from another server.

`config-reference.md` comes from the config's own classes (`vlsi_fast.config`), so it cannot be stale; `contributing.md`
and `changelog.md` are the repository's files. None of the three is in docs/.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

REPOSITORY_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
FOREIGN = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>", re.I)
INTRODUCTION = """\
# Config reference

A run is one YAML file. A file that begins with `extends: other.yaml` holds only what differs from that file. The
command line overrides any option by its dotted name, `--interact.training.max_steps 20`; an element of a list by its
number, `--data.train.0.limit 100`. Each stage's `training` section overrides fields of the common `training` section.

`data.train[]` stands for each source of that list; the sources of `data.eval` have the same options.

This page is made from the program's own option classes. `vlsi-fast train --options` prints the same in a terminal. An
unknown name, a wrong type or options that contradict each other are errors when the file is read.
"""


# ---- the config reference ----


def config_reference() -> str:
    """The page: a heading for every section, a table of its options."""
    from vlsi_fast.config import RunConfig

    parts = [INTRODUCTION]
    for name, section in sections(RunConfig):
        title = f"`{name}`" if name else "The run itself"
        parts += [f"## {title}", " ".join(section.__doc__.split()), table(section, name)]
    return "\n\n".join(parts) + "\n"


def sections(kind: type[BaseModel], name: str = "") -> list[tuple[str, type[BaseModel]]]:
    """Dotted name and class of a section and of all below it; `train[]` is an element of the list `train`."""
    found = [(name, kind)]
    for field, info in kind.model_fields.items():
        below = section_of(info.annotation)
        if below is not None:
            label = f"{name}.{field}" if name else field
            many = "[]" if get_origin(info.annotation) is list else ""
            if below not in (each for _, each in found):  # data.train and data.eval have one kind of element
                found += sections(below, label + many)
    return found


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class that a field holds, alone or in a list."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def table(section: type[BaseModel], name: str) -> str:
    """A line for each option: name, type, default, meaning. Raises ValueError where one has no documentation."""
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for field, info in section.model_fields.items():
        if not info.description:
            raise ValueError(f"{section.__name__}.{field} has no documentation: add a string under the field")
        label = f"{name}.{field}" if name else field
        meaning = " ".join(info.description.split())
        cells = (f"`{label}`", type_name(info), default_of(info), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def type_name(info: FieldInfo) -> str:
    """The type in words, with the bounds that are checked."""
    bounds = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    rules = [(sign, getattr(rule, key, None)) for rule in info.metadata for key, sign in bounds.items()]
    limits = [f"{sign} {value:,g}" for sign, value in rules if value is not None]
    return ", ".join([_words(info.annotation), *limits])


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{_yaml(value)}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_words(each) for each in inner)
    if origin is list:
        return f"list of {_words(inner[0])}"
    if section_of(kind) is not None:
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", type(None): "`null`"}
    return names.get(origin or kind, "mapping" if (origin or kind) is dict else str(kind))


def default_of(info: FieldInfo) -> str:
    """The default as YAML has it."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return "see its section" if isinstance(value, BaseModel) else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n")
    return text.removesuffix("\n...")


# ---- what MkDocs calls ----


def on_files(files, config):
    """Adds the pages that are not in docs/."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "config-reference.md", content=config_reference()))
    for page, source in REPOSITORY_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_post_page(output, page, config):
    """Refuses a page that would load a script, a style, a font or a picture from another server."""
    foreign = FOREIGN.findall(output)
    if foreign:
        raise ValueError(f"{page.file.src_uri} loads from another server: {foreign[0]}")
    return output
