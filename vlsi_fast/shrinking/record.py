"""What a shrunk copy remembers, `vlsi_shrink.json`, and what `layers: auto` of a run's config makes of it.

It goes along with the students that stages train from the copy. Needs no torch to be read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config_files import ConfigError
from ..lineage import checkpoint_digest

if TYPE_CHECKING:
    from ..config import RunConfig

SHRINK_NAME = "vlsi_shrink.json"
FORMAT = 1


def read_shrink_record(checkpoint: str | Path) -> dict[str, Any] | None:
    """The record of a checkpoint, a folder or a Hub name; None where it has none.

    Raises:
        ConfigError: the file is damaged, or of a newer format.
    """
    path = Path(checkpoint) / SHRINK_NAME
    if not Path(checkpoint).is_dir():
        path = _from_hub(str(checkpoint))
    if path is None or not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        newer, kept = record["format"] > FORMAT, record["kept_layers"]
        source = {name: record["source"][name] for name in ("name", "path", "digest", "decoder_layers")}
        whole = sorted(set(kept)) == kept and len(kept) > 0 and 1 <= kept[0] and kept[-1] <= source["decoder_layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}); shrink the model again") from None
    if newer:
        raise ConfigError(f"{path} has format {record['format']}; update vlsi-fast")
    if not whole:
        raise ConfigError(f"{path} is damaged: kept_layers is {kept}; shrink the model again")
    return record


def _from_hub(name: str) -> Path | None:
    if name.count("/") != 1 or name.startswith("."):
        return None
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found = cached_file(name, SHRINK_NAME, **quiet)
    except OSError:
        return None
    return Path(found) if found else None


def carry_record(source: Path, target: Path) -> None:
    """A model trained from a shrunk copy keeps the copy's record: its layers still are those of the source."""
    if (source / SHRINK_NAME).is_file():
        shutil.copyfile(source / SHRINK_NAME, target / SHRINK_NAME)


def describe(record: dict[str, Any]) -> str:
    """`layers 1, 3, 6, 8 of the 8 of NAME`, without folders."""
    source = record["source"]
    kept = ", ".join(map(str, record["kept_layers"]))
    return f"decoder layers {kept} of the {source['decoder_layers']} of {source['name']}"


def shrunk_targets(depth: int) -> list[int]:
    """Target layers of a shrunk student: the paper's 2, 6, 10, ..; below 8 layers all but the last."""
    from ..backbones import default_layers

    return default_layers(depth) if depth >= 8 else list(range(1, depth)) or [1]


def auto_layers(run: RunConfig, role: str, depth: int, teacher: Path | None = None) -> list[int]:
    """What `layers: auto` of a role stands for.

    The student's are `shrunk_targets`. The teacher's are those that the student's target layers, however chosen, were
    in the teacher: kept_layers[k - 1] for each k.

    Args:
        run: the config.
        role: student or teacher.
        depth: decoder layers of that role's model.
        teacher: folder of the teacher's checkpoint, which must be the one that was shrunk; None: not compared.

    Raises:
        ConfigError: the student is no shrunk copy, or none of this teacher; the message names the fix.
    """
    source = run.student.path
    record = read_shrink_record(source)
    if record is None:
        raise ConfigError(
            f"{role}.layers is auto, but the student {source} has no {SHRINK_NAME}: it is no shrunk copy. Make one "
            f"with `vlsi-fast shrink`, or set {role}.layers to a list, or to null for the paper's"
        )
    kept = record["kept_layers"]
    layers = _student_layers(run, len(kept))
    if role == "student":
        if depth != len(kept):
            raise ConfigError(
                f"student.layers is auto, but {source} has {depth} decoder layers and its {SHRINK_NAME} tells of "
                f"{len(kept)}; shrink the model again, or set student.layers to a list"
            )
        return layers
    outside = [k for k in layers if k > len(kept)]
    if outside:
        raise ConfigError(f"student.layers: {outside} out of range; {source} has {len(kept)} decoder layers")
    theirs = [kept[k - 1] for k in layers]
    same = depth == record["source"]["decoder_layers"]
    if same and teacher is not None:
        same = checkpoint_digest(teacher) == record["source"]["digest"]
    if not same:
        raise ConfigError(
            f"teacher.layers is auto, but the student {source} is a shrunk copy of {record['source']['path']}, not of "
            f"teacher.path {run.teacher.path}. Set teacher.path to that model or teacher.layers to a list (here it was "
            f"{theirs}), or to null for the paper's"
        )
    return theirs


def _student_layers(run: RunConfig, depth: int) -> list[int]:
    from ..backbones import default_layers

    if run.student.layers is None:
        return default_layers(depth)
    return shrunk_targets(depth) if run.student.layers == "auto" else list(run.student.layers)
