"""Which decoder layers a shrunk copy keeps. Layers count from 1: layer k's output is the state after k layers."""

from __future__ import annotations

from ..config_files import ConfigError


def even_layers(depth: int, count: int, fixed: int = 0) -> list[int]:
    """`count` of `depth` layers, evenly spread, the first and the last kept: of 8, 4 are 1, 3, 6, 8.

    Args:
        depth: layers that there are.
        count: layers to keep.
        fixed: so many of the first layers stay in any case; the others are spread from the last of these on.

    Raises:
        ConfigError: more layers than there are, or too few to keep both ends.
    """
    require_count(depth, count, fixed)
    if count == depth:
        return list(range(1, depth + 1))
    first = max(1, fixed)
    steps, gaps = depth - first, count - first
    if gaps < 1:
        raise ConfigError(
            f"keep_layers: {count} evenly spread layers cannot hold layers 1 .. {first} and the last; keep at least "
            f"{first + 1}, or name the layers"
        )
    spread = [first + (2 * i * steps + gaps) // (2 * gaps) for i in range(gaps + 1)]  # rounded, halves up
    return [*range(1, first), *spread]


def influential_layers(influence: list[float], count: int, fixed: int = 0) -> list[int]:
    """The `count` layers of largest influence, in their order; of equal ones the shallower. `fixed`: as above.

    Raises:
        ConfigError: more layers than there are, or fewer than `fixed`.
    """
    require_count(len(influence), count, fixed)
    free = sorted(range(fixed + 1, len(influence) + 1), key=lambda k: -influence[k - 1])
    return sorted([*range(1, fixed + 1), *free[: count - fixed]])


def require_count(depth: int, count: int, fixed: int) -> None:
    """Raise ConfigError where `count` of `depth` layers cannot be kept."""
    if not 1 <= count <= depth:
        raise ConfigError(f"keep_layers: {count} of a model of {depth} decoder layers; use 1 .. {depth}")
    if count < fixed:
        raise ConfigError(f"keep_layers: {count}. {_why(fixed)}; keep at least {fixed}")


def require_list(layers: list[int], depth: int, fixed: int) -> None:
    """Raise ConfigError where a list of layers cannot be kept: it must rise within 1 .. `depth` and hold `fixed`."""
    if not layers or sorted(set(layers)) != layers:
        raise ConfigError(f"keep_layers must be a non-empty, strictly rising list, got {layers}; sort it")
    outside = [k for k in layers if not 1 <= k <= depth]
    if outside:
        raise ConfigError(f"keep_layers: {outside} out of range; the model has {depth} layers: use 1 .. {depth}")
    lost = [k for k in range(1, fixed + 1) if k not in layers]
    if lost:
        raise ConfigError(f"keep_layers leaves out {lost}. {_why(fixed)}; add them")


def _why(fixed: int) -> str:
    return (
        f"The model adds vision features behind each of its first {fixed} layers (deepstack), whichever these are: "
        f"layers 1 .. {fixed} must stay"
    )
