"""Names and paths: nothing of this repository shadows another package, and everything it offers can be imported."""

import importlib
import importlib.metadata
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vlsi_fast"

# Top-level names that our dependencies import, directly or through one another.
FOREIGN_NAMES = set(
    """
    PIL absl accelerate aiohttp anyio attr bitsandbytes certifi charset_normalizer click cycler datasets deepspeed dill
    easy_vqa einops evaluate filelock flash_attn fsspec google grpc hf_transfer hf_xet hjson httpcore httpx
    huggingface_hub idna jinja2 joblib kernels liger_kernel markdown markdown_it markupsafe mdurl mlflow mpmath msgpack
    multiprocess networkx ninja numpy optimum packaging pandas peft psutil py pyarrow pydantic pydantic_core pygments
    pytest regex requests rich safetensors scipy sentencepiece setuptools six sklearn sniffio soundfile sympy
    tensorboard tensorboardX tiktoken tokenizers torch torchvision tqdm transformers triton trl typer typing_extensions
    urllib3 utils wandb werkzeug xxhash yaml yarl
    """.split()
)


def python(code: str, *arguments: str, cwd=ROOT) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else []), *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=1200,
    )


def own_modules() -> list[str]:
    names = ["vlsi_fast", "vlsi_kernels"]
    for name in tuple(names):
        found = pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}.")
        names += [module.name for module in found if module.name != "vlsi_fast.train"]
    return names


# ---- shadowing ----


def test_kernels_is_no_regular_package_of_this_repository():
    done = python("import kernels; print('imported', kernels.__file__)")
    if done.returncode:
        assert "ModuleNotFoundError: No module named 'kernels'" in done.stderr
        return
    found = done.stdout.split(maxsplit=1)[1].strip()
    assert found == "None" or not Path(found).is_relative_to(ROOT), f"import kernels gives {found}"


def test_no_package_files_where_only_folders_belong():
    for folder in ("kernels", "tests", "benchmarks", "tests/kernels", "."):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would make {folder} importable"


def test_transformers_is_unharmed_from_the_repository_root():
    code = (
        "import transformers\n"
        "from transformers import Qwen2VLForConditionalGeneration, Trainer\n"
        "from transformers.utils import is_kernels_available\n"
        "print(transformers.__file__, is_kernels_available())"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    file, has_kernels = done.stdout.split()[-2:]
    assert not Path(file).is_relative_to(PACKAGE)
    installed = any(d.name == "kernels" for d in importlib.metadata.distributions())
    assert installed or has_kernels == "False", "transformers takes our folder kernels/ for the PyPI package"


def test_no_name_in_the_package_is_taken():
    """`deepspeed vlsi_fast/train.py` starts with vlsi_fast/ on the path."""
    assert {"inspect", "types", "queue"} <= sys.stdlib_module_names
    names = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert {"config", "matching", "data"} <= names
    assert not names & (sys.stdlib_module_names | FOREIGN_NAMES)


def test_train_takes_its_own_folder_off_the_path(tmp_path):
    """Run as a file beside decoys that fail when imported."""
    decoys = ("argparse", "inspect", "yaml", "json")
    for name in decoys:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('decoy imported')\n")
    shutil.copy(PACKAGE / "train.py", tmp_path / "train.py")
    done = python("", str(tmp_path / "train.py"), "--help")
    assert done.returncode == 0, done.stderr
    assert "--stage" in done.stdout and "--config" in done.stdout
    relative = python("", "train.py", "--help", cwd=tmp_path)
    assert relative.returncode == 0, relative.stderr


def test_train_leaves_no_way_to_its_folder():
    code = (
        "import os, runpy, sys\n"
        f"folder = {str(PACKAGE)!r}\n"
        "sys.path[:0] = [folder, os.path.join('vlsi_fast', '')]\n"
        "runpy.run_path(os.path.join(folder, 'train.py'), run_name='imported')\n"
        "print([p for p in sys.path if os.path.abspath(p) == folder])"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ---- what is offered ----


@pytest.mark.parametrize("name", own_modules())
def test_modules_import_and_offer_what_they_list(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    listed = getattr(module, "__all__", [])
    assert len(set(listed)) == len(listed)
    for item in listed:
        assert hasattr(module, item), f"{name}.__all__ lists {item}"


def test_packages_have_their_public_names():
    import vlsi_fast
    import vlsi_kernels

    assert {"load_config", "run"} <= set(vlsi_fast.__all__)
    assert {
        "head_statistics",
        "linear_logsumexp",
        "linear_cross_entropy",
        "teacher_targets",
        "layer_kl_matrix",
        "verb_ffn",
    } <= set(vlsi_kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_confg'"):
        vlsi_fast.load_confg  # noqa: B018


def test_a_config_is_read_without_what_reads_the_rows():
    code = (
        "import sys, vlsi_fast.config\n"
        "print([name for name in sys.modules if name.startswith(('vlsi_fast.data', 'vlsi_fast.eval', 'torch', 'PIL'))])"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_imports_are_no_heavier_than_promised():
    """The operators need only PyTorch; the version needs nothing."""
    code = (
        "import sys, vlsi_fast\n"
        "assert vlsi_fast.__version__ and 'torch' not in sys.modules\n"
        "import vlsi_kernels\n"
        "heavy = {'transformers', 'deepspeed', 'peft', 'datasets', 'pydantic'} & set(sys.modules)\n"
        "assert 'torch' in sys.modules and not heavy and 'vlsi_fast.config' not in sys.modules, heavy"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
