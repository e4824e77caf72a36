import gc
import os

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined, so before the first import of one
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tiny_runs as runs  # noqa: E402
from kernels_util import make_interpreter_round_to_nearest  # noqa: E402

make_interpreter_round_to_nearest()


def pytest_collection_finish():
    """A stage collects garbage several times; what is imported and collected by now need not be searched each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def poisoned_memory(monkeypatch):
    """In deterministic mode PyTorch fills fresh memory with NaN, so that reading it unwritten shows."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Folder with a tiny teacher, a tiny student and a dataset; tests write elsewhere."""
    folder = tmp_path_factory.mktemp("workspace")
    runs.make_models(folder)
    runs.make_rows(folder)
    return folder
