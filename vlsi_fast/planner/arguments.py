"""Options of `vlsi-fast plan` and `check`, and the machine they speak of. Imports nothing heavy: `--help` is quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ..sizes import parse_size
from .dry_run.gpus import GPUS


@dataclass(frozen=True)
class Machine:
    """What a run is planned for. Defaults: A100 80GB SXM, NVLink 3, eight 200 Gb/s InfiniBand cards a node."""

    gpus: int = 8
    """GPUs of a node."""
    nodes: int = 1
    memory_bytes: int = 80 * 2**30
    peak_flops: float = 312e12
    """Dense bf16, of the datasheet."""
    utilisation: float = 0.45
    """Share of the peak that training reaches: an assumption."""
    link_bytes: float = 300e9
    """NVLink of one GPU, one direction, bytes a second (datasheet: 600 GB/s both ways)."""
    network_bytes: float = 200e9
    """Network of one node, one direction, bytes a second (8 x 200 Gb/s)."""

    pcie_bytes: float = 31.5e9
    """PCIe of one GPU, one direction, bytes a second (4.0 x16), with which teacher.mode offload brings weights."""

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `plan` command."""
    m = Machine()
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--gpus", type=int, default=m.gpus, help="GPUs of a node (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=m.nodes, help="nodes (default: %(default)s)")
    parser.add_argument("--gpu-memory", type=parse_size, default=m.memory_bytes, help="of one GPU (default: 80GiB)")
    parser.add_argument("--teacher-config", help="config.json of the teacher, where teacher.path is not at hand")
    parser.add_argument("--student-config", help="config.json of the student, where student.path is not at hand")
    parser.add_argument("--tokens", type=int, help="longest row, for memory (default: data.max_length)")
    parser.add_argument("--answer-tokens", type=int, default=512, help="answer tokens of it (default: %(default)s)")
    parser.add_argument("--mean-tokens", type=int, help="mean row, for time (default: its image + 256)")
    parser.add_argument("--mean-answer-tokens", type=int, default=128, help="of the mean row (default: %(default)s)")
    parser.add_argument("--image-tokens", type=int, help="of one image a row (default: from data.max_pixels)")
    parser.add_argument("--samples", type=int, default=2_900_000, help="rows of a stage (default: the paper's 2.9M)")
    parser.add_argument("--peak-tflops", type=float, default=m.peak_flops / 1e12, help="of a GPU (default: A100's 312)")
    parser.add_argument("--utilisation", type=float, default=m.utilisation, help="share of it (default: %(default)s)")
    parser.add_argument("--link-gbs", type=float, default=m.link_bytes / 1e9, help="GB/s of a GPU's links, one way")
    parser.add_argument("--network-gbs", type=float, default=m.network_bytes / 1e9, help="GB/s of a node, one way")
    parser.add_argument("--pcie-gbs", type=float, default=m.pcie_bytes / 1e9, help="GB/s of a GPU's PCIe, one way")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `check` command."""
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--rows", type=int, default=16, help="rows sampled of each source (default: %(default)s)")
    device = "also compare operators, liger-kernel's modules and attention with plain PyTorch, here"
    parser.add_argument("--device", action="store_true", help=device)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="instead: one step of each stage at real sizes on a GPU that is not there; needs no weights and no rows",
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="of the dry run (default: %(default)s)")
    parser.add_argument("--teacher-config", help="config.json of the teacher, for a dry run without teacher.path")
    parser.add_argument("--student-config", help="config.json of the student, for a dry run without student.path")
