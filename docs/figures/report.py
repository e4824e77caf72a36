"""Makes report.png, the head of a run's report. After a change of the page: python docs/figures/report.py [RUN]

RUN is a folder that `vlsi-fast demo` wrote; the committed picture is of `make demo`. Without it: the
shipped example, whose pictures are drawn and whose models are scored here (minutes). Needs Chromium
(`apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from vlsi_fast.cli import main as vlsi_fast
from vlsi_fast.demo.example import FOLDER
from vlsi_fast.demo.inputs import MAX_ANSWER, draw_data
from vlsi_fast.demo.models import MODELS
from vlsi_fast.report.command import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT = 1200, 1940
"""Of the picture, pixels."""


def example_page(folder: Path) -> Path:
    """The report of the shipped example, with the scores of its models on the demo's test pictures."""
    run = folder / "example"
    shutil.copytree(FOLDER, run)
    (folder / "models").symlink_to(MODELS)  # where the example's records say that the teacher is
    draw_data(run / "data")
    with contextlib.chdir(run), open("scores.json", "w") as file, contextlib.redirect_stdout(file):
        models = ["--run", ".", "--model", "start/student", "--model", "../models/teacher"]
        if vlsi_fast(["eval", *models, "--max-new-tokens", str(MAX_ANSWER), "--batch-size", "50", "--json"]):
            raise SystemExit("the example could not be scored")
    with contextlib.chdir(run):
        return write_report(["."], results=[Path("scores.json")], max_new_tokens=MAX_ANSWER).resolve()


def screenshot(page: Path, target: Path) -> None:
    """The page's head as a PNG of few colours."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("no Chromium: apt-get install chromium")
    words = ["--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
    words += ["--blink-settings=preferredColorScheme=1", f"--screenshot={target}"]
    subprocess.run([browser, *words, page.resolve().as_uri()], check=True, capture_output=True)
    with Image.open(target) as image:
        image.convert("RGB").quantize(256).save(target, optimize=True)


def main() -> None:
    """Write the page, then the picture beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="a run of the demo (default: the shipped example)")
    run = parser.parse_args().run
    with tempfile.TemporaryDirectory() as folder:
        page = write_report([run], Path(folder) / "page.html", max_new_tokens=MAX_ANSWER) if run else None
        screenshot(page or example_page(Path(folder)), Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
