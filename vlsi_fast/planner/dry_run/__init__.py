"""`vlsi-fast check --dry-run`: one step of each stage at the config's real sizes, on a GPU that is not there.

Tensors have shapes and no numbers. What runs is the stages' own code, forward, backward and optimizer.

Reading order: gpus.py (which GPUs), device.py (what makes Python see one), tape.py (what is noted of each operator:
memory, products, waits), autocast.py (its rules, which such tensors lack), kernels.py (Triton's compiler for that GPU),
rows.py, optimizers.py and stage.py (a stage without its checkpoints and rows, and its step), run.py (all stages),
command.py (the tables).
"""
