import pytest
import tiny_runs as runs


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Folder with a tiny teacher, a tiny student and a dataset; tests write elsewhere."""
    folder = tmp_path_factory.mktemp("workspace")
    runs.make_models(folder)
    runs.make_rows(folder)
    return folder
