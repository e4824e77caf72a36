"""What the stages replace inside transformers' Trainer is there to be replaced, in the version that is installed."""

import inspect
import os
from pathlib import Path

import pytest
import transformers
from transformers import Trainer

from vlsi_fast.stages import evaluating, hooks, trackers, trainer

STAGES = Path(trainer.__file__).parent


@pytest.mark.parametrize("name", hooks.replaced())
def test_a_replaced_method_is_called_as_the_trainers_own(name):
    theirs, ours = (inspect.signature(getattr(kind, name)).parameters for kind in (Trainer, hooks.HookedTrainer))
    if any(p.kind is p.VAR_POSITIONAL for p in ours.values()):
        return
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_no_private_method_is_replaced_elsewhere():
    """A subclass has private methods of its own, with other names than the Trainer's."""
    assert {"_save_checkpoint", "_run_epoch", "_load_rng_state"} <= set(hooks.replaced())
    methods = vars(trainer.StageTrainer).keys() | vars(evaluating.EvaluatingTrainer).keys()
    own = {name for name in methods if name.startswith("_") and not name.startswith("__")}
    assert own and not [name for name in own if hasattr(Trainer, name)]
    patched = [file.name for file in STAGES.glob("*.py") if "transformers.trainer." in file.read_text()]
    assert patched == ["hooks.py"]


def test_a_version_without_a_hook_is_refused():
    there = dict.fromkeys([*hooks.replaced(), "_get_learning_rate"])
    del there["_load_scaler"]
    with pytest.raises(ImportError, match=rf"{transformers.__version__} has no Trainer._load_scaler, .*<6"):
        hooks.require_hooks(type("Newer", (), there))
    hooks.require_hooks(Trainer)


def test_the_environments_own_folder_of_tensorboard_comes_back(tmp_path, monkeypatch):
    for mine in ("mine", None):
        monkeypatch.setenv(trackers.LOGGING_DIR, "mine") if mine else monkeypatch.delenv(trackers.LOGGING_DIR)
        with pytest.raises(RuntimeError), trackers.tensorboard_in(tmp_path):
            assert os.environ[trackers.LOGGING_DIR] == str(tmp_path)
            raise RuntimeError
        assert os.environ.get(trackers.LOGGING_DIR) == mine
