"""Which checkpoint a stopped stage goes on from: the newest whose files are all as they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoints import MANIFEST_NAME, checkpoints, damage, metrics_damage
from .lineage import LineageError
from .ranks.sharding import gathered_objects, rank, world_size

SHOWN = 4
"""Damaged files that a message names, of each checkpoint."""


def checkpoint_to_resume(folder: Path, record: dict[str, Any]) -> str | None:
    """The newest checkpoint of a stage that is whole; None where the stage had not come to write one.

    Every file is hashed before anything is read; ranks share the work. Collective.

    Args:
        folder: the stage's.
        record: its `vlsi_stage.json`.

    Raises:
        LineageError: there are checkpoints, and all are damaged, or older than manifests.
    """
    found = [folder / name for name in gathered_objects([p.name for p in checkpoints(folder)])[0]]
    finished = [p for p in reversed(found) if (p / MANIFEST_NAME).exists()]
    said = []
    for checkpoint in finished:
        own = damage(checkpoint, rank(), world_size()) + (metrics_damage(checkpoint) if rank() == 0 else [])
        wrong = sorted({line for lines in gathered_objects(own) for line in lines})
        if not wrong:
            for line in said if rank() == 0 else ():
                print(f"vlsi-fast: {line}: it is deleted, and the run goes on from {checkpoint.name}", flush=True)
            return str(checkpoint)
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        said.append(f"{checkpoint} is not what was written: {'; '.join(wrong[:SHOWN])}{more}")
    if said:
        raise LineageError(
            "no checkpoint can be continued from:\n  " + "\n  ".join(said) + "\nRestore these files from a copy; or "
            f"delete the checkpoint folders in {folder}, then --resume starts the stage over; or choose another "
            "output_dir"
        )
    if record.get("format", 1) < 2 and any((p / "trainer_state.json").is_file() for p in found):
        raise LineageError(
            f"{folder} was begun by an older vlsi-fast, whose checkpoints have no {MANIFEST_NAME} and cannot be "
            f"checked: finish it with that version, or delete {folder} and run the stage again"
        )
    return None
