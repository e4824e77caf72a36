"""Faster parts of the backbones: chosen where they apply, refused with the fix where they do not."""

import pytest
import tiny_runs as runs
import torch

from vlsi_fast import load_config
from vlsi_fast.acceleration import attention_name
from vlsi_fast.stages import STAGE_CLASSES, common

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def config_of(workspace, output, **sections):
    tree = runs.settings(workspace, output, max_steps=1) | {"sft": {"start_from": "base"}} | sections
    return load_config(runs.write_config(tree, output.parent / f"{output.name}.yaml"))


# ---- attention ----


@pytest.mark.parametrize("installed", [True, False])
def test_auto_attention(monkeypatch, installed):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: installed)
    assert attention_name("auto", "bfloat16", CUDA) == ("flash_attention_2" if installed else "sdpa")
    assert attention_name("auto", "float32", CUDA) == attention_name("auto", "bfloat16", CPU) == "sdpa"
    for name in ("sdpa", "eager", "flash_attention_2"):
        assert attention_name(name, "float32", CPU) == name


def test_the_choice_reaches_the_model_and_the_record_and_is_no_part_of_the_run(workspace, tmp_path, monkeypatch):
    """A run may go on with another attention: on another machine `auto` may be another one."""
    loaded, load = [], common.load_backbone

    def recorded(folder, dtype, attention="sdpa"):
        loaded.append(attention)
        return load(folder, dtype, attention)

    monkeypatch.setattr(common, "load_backbone", recorded)
    config = config_of(workspace, tmp_path / "run")
    assert config.student.attn_implementation == "auto"
    record = STAGE_CLASSES["sft"](config).run()
    assert loaded[0] == "sdpa" and record["summary"]["attention"] == {"student": "sdpa"}
    config.student.attn_implementation = "eager"
    assert STAGE_CLASSES["sft"](config).run(resume=True)["state"] == "finished"
    record = STAGE_CLASSES["sft"](config.model_copy(update={"output_dir": str(tmp_path / "eager")})).run()
    assert record["summary"]["attention"] == {"student": "eager"}
