"""What a run needs, looked at before it starts: named checks, each failure with its fix.

`vlsi-fast check` runs all of them, without weights; each stage runs some on what it has opened anyway. Checks are
independent: one that fails, or cannot be made, hides no other. Those that exist elsewhere are called, not repeated.

Reading order: subject.py (what is looked at, what a check may find), models.py, data.py, machine.py (the checks),
device.py (the comparisons of `--device`), command.py (the table of checks, and who runs it).
"""
