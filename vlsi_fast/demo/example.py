"""The small example run that is shipped, and how it was made: `python -m vlsi_fast.demo.example`.

It is the demo's three stages (`configs/demo.yaml`, with all of its 100 + 300 + 200 steps of 64 rows) in one process,
without DeepSpeed. Kept in the package, weights in bfloat16: the verbalizers of teacher and student, the distilled
student, the stages' records and metrics. The models that it started from are the demo's, `demo/models`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from ..runs import Run, open_run

NAME = "demo"
"""What `--run` calls it."""
FOLDER = Path(__file__).resolve().parent / "example_run"
OVERRIDES = {
    "training.deepspeed": None,
    "training.per_device_train_batch_size": 64,
    "training.save_steps": 1000,
    "training.report_to": [],
}
"""Of `configs/demo.yaml`."""
TEST_QUESTION = 44
"""Number of the easy-VQA test question asked where the user asks none: of those that are no yes/no questions the
first that all three models answer right and no first layer does."""


def example_run() -> Run:
    """The shipped run."""
    return open_run(FOLDER)


def example_question() -> tuple[Path, str]:
    """A test image of easy-VQA and a question about it.

    Raises:
        FileNotFoundError: easy-vqa is not installed.
    """
    try:
        import easy_vqa
    except ImportError:
        raise FileNotFoundError(
            "the example asks about an image of easy-vqa, which is not installed: pip install easy-vqa, or give "
            "--image and --question"
        ) from None
    questions, _, images = easy_vqa.get_test_questions()
    path = Path(easy_vqa.__file__).parent / easy_vqa.get_test_image_paths()[images[TEST_QUESTION]]
    return path.resolve(), questions[TEST_QUESTION]


def main() -> int:
    """Train, and write what is shipped into the package."""
    from ..config import load_config
    from ..stages import run

    parser = argparse.ArgumentParser(prog="python -m vlsi_fast.demo.example", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/demo.yaml", help="the demo (default: %(default)s)")
    parser.add_argument("--work_dir", default="runs/example", help="folder of the run (default: %(default)s)")
    arguments = parser.parse_args()
    run(load_config(arguments.config, OVERRIDES | {"output_dir": arguments.work_dir}), "all", resume=True)
    pack(open_run(arguments.work_dir), FOLDER)
    return 0


def pack(run: Run, target: Path) -> None:
    """Copy what viewers read of a run, weights in bfloat16, paths relative to the run's folder."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(target, ignore_errors=True)
    folders = [run.verbalizers("teacher"), run.verbalizers("student"), run.student]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    for stage in run.records:
        files += [run.folder / stage / "vlsi_stage.json", run.folder / stage / "metrics.jsonl"]
    for file in files:
        copied = target / file.relative_to(run.folder)
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
    """Paths in a record or spec: of the demo's models and of the run itself, seen from the run's folder."""
    if isinstance(tree, dict):
        return {name: _with_paths(value, run) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_with_paths(value, run) for value in tree]
    if isinstance(tree, str) and tree.startswith(str(run.folder)):
        return "." + tree.removeprefix(str(run.folder))
    for role in ("teacher", "student"):
        if isinstance(tree, str) and tree.endswith(f"demo/models/{role}"):
            return f"../models/{role}"
    return tree


if __name__ == "__main__":
    sys.exit(main())
