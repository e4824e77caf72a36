"""The small example run that is shipped, and how it was made: `python -m vlsi_fast.demo.example`.

It is the demo's VLsI (`configs/demo.yaml`, with all of its steps) in one process, without DeepSpeed. Kept in the
package, weights in bfloat16: the student before and after, the verbalizers of teacher and student, the stages' records
and metrics. The teacher is the demo's, `demo/models/teacher`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs import Run, open_run

if TYPE_CHECKING:
    from PIL import Image

NAME = "demo"
"""What `--run` calls it."""
FOLDER = Path(__file__).resolve().parent / "example_run"
OVERRIDES = {
    "training.deepspeed": None,
    "training.per_device_train_batch_size": 16,
    "training.report_to": [],
}
"""Of `configs/demo.yaml`."""
TEST_PICTURE = 3
"""Number of the test picture asked about where the user asks none: the first that teacher and distilled student
describe rightly, the base student and every first layer wrongly, and that no layer describes worse than the one before
it."""


def example_run() -> Run:
    """The shipped run."""
    return open_run(FOLDER)


def example_question() -> tuple[Image.Image, str, str, str]:
    """A picture of the test split, drawn here, its name, the question about it, and a right answer."""
    from .pictures import QUESTION, describe, scenes

    for split, number, cells, image in scenes():
        if (split, number) == ("test", TEST_PICTURE):
            right = describe(cells, random.Random(0), wordings=1)
            return image, f"test picture {number} of vlsi_fast.demo.pictures", QUESTION, right
    raise RuntimeError(f"demo.pictures has no test picture {TEST_PICTURE}; set TEST_PICTURE to one that it has")


def main() -> int:
    """Train, and write what is shipped into the package."""
    from ..config import load_config
    from ..stages import run
    from .inputs import draw_data, make_student

    parser = argparse.ArgumentParser(prog="python -m vlsi_fast.demo.example", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/demo.yaml", help="the demo (default: %(default)s)")
    parser.add_argument("--work-dir", default="runs/example", help="folder of the run (default: %(default)s)")
    arguments = parser.parse_args()
    work = Path(arguments.work_dir)
    places = {"output_dir": str(work), "data.root": str(work / "data"), "student.path": str(work / "start" / "student")}
    config = load_config(arguments.config, OVERRIDES | places)
    if not (work / "data" / "test.jsonl").exists():
        draw_data(work / "data")
    if not Path(config.student.path).exists():
        make_student(config)
    run(config, "all", resume=True)
    pack(open_run(work), FOLDER)
    return 0


def pack(run: Run, target: Path) -> None:
    """Copy what viewers read of a run, weights in bfloat16, paths relative to the run's folder."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(target, ignore_errors=True)
    folders = [run.verbalizers("teacher"), run.verbalizers("student"), Path(run.base("student")), run.student]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    for stage in run.records:
        files += [run.folder / stage / "vlsi_stage.json", run.folder / stage / "metrics.jsonl"]
    for file in files:
        copied = target / file.resolve().relative_to(run.folder.resolve())
        copied.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            save_file({n: t.bfloat16() for n, t in load_file(file).items()}, copied, metadata={"format": "pt"})
        elif file.suffix == ".json":
            tree = _with_paths(json.loads(file.read_text()), run)
            text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
            if file.name == "config.json":
                text = text.replace('"dtype": "float32"', '"dtype": "bfloat16"')
            copied.write_text(text)
        else:
            shutil.copyfile(file, copied)


def _with_paths(tree, run: Run):
    """Paths in a record or spec: of the demo's teacher and of the run itself, seen from the run's folder."""
    if isinstance(tree, dict):
        return {name: _with_paths(value, run) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_with_paths(value, run) for value in tree]
    if isinstance(tree, str) and tree.startswith(str(run.folder)):
        return "." + tree.removeprefix(str(run.folder))
    if isinstance(tree, str) and tree.endswith("demo/models/teacher"):
        return "../models/teacher"
    return tree


if __name__ == "__main__":
    sys.exit(main())
