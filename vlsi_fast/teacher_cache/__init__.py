"""What a frozen teacher says, on disk: `vlsi-fast teacher build`, and `teacher.mode: cached`."""
