"""Where the demo's gain comes from: one stage each, equal optimizer steps and rows, scored right after it.

    python benchmarks/demo_variants.py --verbalized runs/demo/verbalize

Every variant starts from the demo's student and makes the interact stage's number of steps, in one process. Writes
`benchmarks/results/demo_variants.json` and prints it as the last line. A variant that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

from demo_seeds import ROOT
from seeds import machine

from vlsi_fast import load_config, run
from vlsi_fast.lineage import versions
from vlsi_fast.scoring import exact_match

VARIANTS = {
    "interact, kld + kld (the paper's)": ("interact", {}),
    "sft, LoRA": ("sft", {"sft.method": "lora"}),
    "sft, full": ("sft", {}),
    "interact, none + kld (last layer alone)": ("interact", {"interact.intermediate": "none"}),
}
"""Name -> stage and overrides of the config."""


def main() -> None:
    """Run, score, collect, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--verbalized", required=True, help="folder of a finished verbalize stage of the demo")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--work-dir", default="runs/demo_variants")
    parser.add_argument("--work_dir", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # its older spelling
    parser.add_argument("--rows", type=int, default=64, help="rows of an optimizer step")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    demo = load_config(arguments.config)
    before = exact_match(demo.student.path, demo.data, dtype=demo.dtype)["accuracy"]
    results, steps = {"student before": before}, demo.stage_training("interact").max_steps
    for i, (name, (stage, overrides)) in enumerate(VARIANTS.items()):
        output = Path(arguments.work_dir) / str(i)
        common = {
            "output_dir": str(output),
            "training.per_device_train_batch_size": arguments.rows,
            "training.report_to": [],
            "student.verbalizers": f"{arguments.verbalized}/student",
            "teacher.verbalizers": f"{arguments.verbalized}/teacher",
            "sft.start_from": "base",
            "sft.training.max_steps": steps,
        }
        config = load_config(arguments.config, common | overrides)
        run(config, stage, resume=True)
        score = exact_match(output / stage / "student", config.data, dtype=config.dtype)
        results[name] = score["accuracy"]
        print(f"{name}: {100 * results[name]:.2f}%", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    result = {
        "benchmark": "demo_variants",
        "optimizer_steps": steps,
        "rows_per_step": arguments.rows,
        "seed": demo.seed,
        "accuracy": results,
        "machine": machine(),
        "versions": versions(),
        "commit": commit.strip(),
    }
    (ROOT / "benchmarks" / "results" / "demo_variants.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
