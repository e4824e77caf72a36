"""A run's fast parts against plain PyTorch on this very device: operators, liger-kernel's modules, attention.

At the start of each stage on CUDA, and by `vlsi-fast check --device`, each part that the stage will use runs once,
forward and backward, on small random inputs of ragged shapes, and so does its plain form in float64. What disagrees is
switched off where its option is `auto`, and refused where it was asked for by name.

Reading order: probe.py (one comparison, and what it may find), operators.py and backbone.py (what is compared),
of_run.py (which of them a stage uses), start.py (what a stage does about it). The first three need PyTorch alone, for
`benchmarks/self_test.py`.
"""
