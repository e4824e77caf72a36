"""The notebook of examples/, executed from its first cell to its last."""

import shutil

import nbformat
import pytest
import tiny_runs as runs
from nbclient import NotebookClient

NOTEBOOK = runs.ROOT / "examples" / "distil.ipynb"


def outputs(notebook) -> str:
    """What cells printed, as text."""
    return "\n".join(one.get("text", "") for cell in notebook.cells for one in cell.get("outputs", []))


def test_its_outputs_are_those_of_a_whole_run():
    """Executed in order, without an error or noise, and the student learned."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {one.output_type if one.output_type != "stream" else one.name for cell in code for one in cell.outputs}
    assert kinds <= {"stdout", "execute_result", "display_data"}
    scores = dict(line.rsplit(maxsplit=2)[:2] for line in outputs(notebook).splitlines() if line.endswith("%"))
    exact = {name.strip(): float(value.rstrip("%")) for name, value in scores.items()}
    assert exact["teacher"] > 95 and exact["student before"] < 5 and exact["VLsI"] > exact["sft alone"] > 20


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    """With few steps, from a checkout's examples/ as Jupyter starts it."""
    for name in ("configs", "vlsi_fast"):
        (tmp_path / name).symlink_to(runs.ROOT / name)
    (tmp_path / "examples").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (chosen,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    chosen.source = "VERBALIZE, INTERACT, SFT, SCORED = 2, 3, 2, 6"
    for name, value in runs.environment().items():
        monkeypatch.setenv(name, value)
    resources = {"metadata": {"path": str(tmp_path / "examples")}}
    done = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert "student before" in outputs(done)
    assert (tmp_path / "runs" / "notebook" / "vlsi" / "report.html").stat().st_size > 10_000
    shutil.rmtree(tmp_path / "runs")
