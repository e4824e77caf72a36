"""`vlsi-fast shrink`: a student made of a teacher, by leaving out decoder layers.

layers.py chooses layers, influence.py measures them, checkpoint.py writes the copy, student.py is the course. record.py
is what the copy remembers (`vlsi_shrink.json`), for `layers: auto` of a run's config. command.py is the command.
"""

__all__ = ["shrink"]


def __getattr__(name: str):
    if name == "shrink":  # torch and transformers take seconds to import; `--help` should not
        from .student import shrink

        return shrink
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
