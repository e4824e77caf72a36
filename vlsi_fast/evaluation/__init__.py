"""`vlsi-fast eval`: answers of stock checkpoints on any rows, scored; the paper's benchmarks by lmms-eval."""
