"""What a folder's safetensors hold, read from their headers alone: no weights, no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"
VERBALIZER_CONFIG = "verbalizer_config.json"
VERBALIZER_WEIGHTS = "verbalizer.safetensors"
"""Files of a folder of verbalizers."""


@dataclass
class Weights:
    """Tensors of one or several safetensors files."""

    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Name -> dtype by its safetensors name (F32, BF16, ..) and shape."""
    files: int = 0
    bytes: int = 0
    """Of the files."""
    problems: list[str] = field(default_factory=list)
    """Files that are missing or damaged, one sentence each."""

    @property
    def parameters(self) -> int:
        """Numbers stored; tied tensors are stored, and count, once."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Dtype -> numbers stored in it, the most frequent first."""
        counts = Counter()
        for dtype, shape in self.tensors.values():
            counts[dtype] += math.prod(shape)
        return dict(counts.most_common())


def read_weights(folder: Path) -> Weights:
    """All safetensors of a folder, compared with its index where it has one."""
    found = Weights()
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        _read_file(file, found)
    index = folder / INDEX_NAME
    if index.is_file():
        _compare_with_index(index, files, found)
    elif not files:
        found.problems.append(f"{folder} holds no *.safetensors")
    return found


def _read_file(file: Path, found: Weights) -> None:
    from safetensors import SafetensorError, safe_open

    found.files += 1
    found.bytes += file.stat().st_size
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                found.tensors[name] = (part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        found.problems.append(f"{file} is damaged or cut off ({error})")


def _compare_with_index(index: Path, files: list[Path], found: Weights) -> None:
    try:
        listed = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        found.problems.append(f"{index} is damaged ({error})")
        return
    absent = sorted(set(listed.values()) - {file.name for file in files})
    found.problems += [f"{index.parent / name} is missing" for name in absent]
    lost = [name for name, file in listed.items() if file not in absent and name not in found.tensors]
    if lost and not found.problems:
        found.problems.append(f"{index.parent} lacks {len(lost)} tensors of its index, such as {lost[0]}")
