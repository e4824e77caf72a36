"""What a compiled kernel costs, as NVIDIA's assembler says. Needs Triton, which brings the assembler, and no GPU."""

import re
import subprocess
import tempfile
from pathlib import Path

SHARED_LIMIT_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one block may ask for, by compute capability (CUDA programming guide, compute capabilities)."""


def assemble(ptx: str) -> tuple[int, int, int]:
    """Registers per thread, bytes spilled (stores and loads) and bytes of stack, per thread, from ptxas -v."""
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE).group(1)
    ptxas = get_ptxas(int(re.search(r"\d+", architecture).group()))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas.path, "-v", "--gpu-name", architecture, str(source), "-o", f"{folder}/kernel.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True)
    text = log.stdout + log.stderr
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
    ).groups()
    registers = re.search(r"Used (\d+) registers", text).group(1)
    return int(registers), int(stores) + int(loads), int(stack)
