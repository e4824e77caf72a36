"""Write a run's student as a stock checkpoint, and prove that what was written is that student."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.encoding import configure_image_bounds
from ..data.processors import load_processor
from ..errors import UserError
from ..lineage import LineageError, checkpoint_digest
from ..loading import load_backbone, resolve_folder, tokenizer_digest
from ..runs import Run
from ..weights import read_weights

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
LOADED_TOLERANCE = 1e-5
"""Largest relative error (norm of the difference / norm) of the logits after loading: the same weights in the same code
give the same numbers, but for the order of sums."""
CAST_TOLERANCE = 0.1
"""The same, of a cast: rounding to bfloat16 errs by 2^-9 a weight and step. Small random models showed 0.02."""


class ExportError(UserError, RuntimeError):
    """What was written is not what was to be exported."""

    exit_code = 1


@dataclass(frozen=True)
class Source:
    """Where the student comes from."""

    checkpoint: Path
    """Stock checkpoint."""
    adapter: Path | None
    """LoRA to merge into it, where the merged student is no longer there."""


@dataclass(frozen=True)
class Written:
    """What was written and how it compared."""

    architecture: str
    dtype: str
    tensors: int
    parameters: int
    bytes: int
    loaded_error: float
    """Of the logits after loading, see `LOADED_TOLERANCE`."""
    cast_error: float | None
    """Of the logits by the cast; None without one."""
    tokenizer: str
    """Digest."""


def find_source(run: Run, stage: str) -> Source:
    """The stage's merged student, or else its adapter and the checkpoint that this one was trained on.

    Raises:
        FileNotFoundError: neither is there.
        LineageError: the checkpoint below the adapter has changed since.
    """
    student, record = run.student_of(stage), run.records[stage]
    if _is_checkpoint(student):
        return Source(student, None)
    adapter = run.folder / stage / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{student} holds no checkpoint, and there is no adapter beside it to make one from; "
            f"delete {student.parent} and run --stage {stage} again"
        )
    fact = record["facts"]["student"]
    base, digest = Path(fact["path"]), fact["checkpoint"]
    if stage == "sft" and record["config"]["sft"]["start_from"] == "interact":
        base, digest = run.folder / "interact" / "student", record["identity"]["inputs"]["student"]
    elif not base.is_dir():
        base = resolve_folder(record["config"]["student"]["path"], "student.path")
    if not _is_checkpoint(base):
        raise FileNotFoundError(f"{adapter} belongs on {base}, which holds no checkpoint; bring it back")
    if checkpoint_digest(base) != digest:
        raise LineageError(f"{adapter} was trained on another checkpoint than {base} now holds; bring that one back")
    return Source(base, adapter)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def write_checkpoint(run: Run, stage: str, source: Source, out: Path, dtype: str | None, shard_bytes: int) -> Written:
    """Write model, generation config and processor to `out`, load them again as a user would, and compare.

    Args:
        run: the run.
        stage: whose student.
        source: from `find_source`.
        out: folder to write.
        dtype: of the weights; None: as they are.
        shard_bytes: largest size of a file.

    Raises:
        ExportError: what was written differs.
    """
    model, processor = _load(run, stage, source)
    own = str(model.dtype).removeprefix("torch.")
    dtype = dtype or own
    inputs = _example(processor)
    expected, cast_error, parameters = _logits(model, inputs), None, model.num_parameters()
    if dtype != own:
        for parameter in model.parameters():  # alone: rotary buffers stay float32, as they are after loading
            parameter.data = parameter.data.to(getattr(torch, dtype))
        before, expected = expected, _logits(model, inputs)
        cast_error = _require_close(expected, before, CAST_TOLERANCE, f"cast to {dtype}, the student")
    model.save_pretrained(out, max_shard_size=shard_bytes)
    processor.save_pretrained(out)
    architecture = type(model).__name__
    del model
    gc.collect()  # before it is loaded a second time
    loaded_error = _require_close(_load_stock(out, inputs), expected, LOADED_TOLERANCE, f"the checkpoint in {out}")
    weights = read_weights(out)
    if weights.problems or weights.parameters != parameters:
        raise ExportError(f"{out} holds {weights.parameters} parameters, the student has {parameters}")
    if tokenizer_digest(load_processor(out).tokenizer) != run.records[stage]["facts"]["student"]["tokenizer"]:
        raise ExportError(f"the tokenizer written to {out} is not the one that the run recorded")
    size = sum(file.stat().st_size for file in out.iterdir())
    digest = tokenizer_digest(processor.tokenizer)
    return Written(architecture, dtype, len(weights.tensors), parameters, size, loaded_error, cast_error, digest)


def _load(run: Run, stage: str, source: Source) -> tuple[nn.Module, Any]:
    """Model, in the dtype of its file, and processor."""
    processor = load_processor(source.checkpoint)
    if source.adapter is None:
        stored = next(iter(read_weights(source.checkpoint).dtypes), None)
        if stored not in DTYPES:
            raise ExportError(f"{source.checkpoint} holds weights in {stored}; known: {', '.join(DTYPES)}")
        return load_backbone(source.checkpoint, DTYPES[stored]), processor
    from peft import PeftModel

    config = run.records[stage]["config"]
    for section in (config["student"], config["data"]):  # as the stage did before it saved its processor
        configure_image_bounds(processor, section["min_pixels"], section["max_pixels"])
    stock = load_backbone(source.checkpoint, config["dtype"])
    return PeftModel.from_pretrained(stock, source.adapter).merge_and_unload(), processor


def _example(processor) -> dict[str, torch.Tensor]:
    """Model inputs of one question about a drawn image."""
    from PIL import Image

    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]
    prompt = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=[image], return_tensors="pt")


@torch.inference_mode()
def _logits(model: nn.Module, inputs) -> torch.Tensor:
    return model(**inputs.to(dtype=model.dtype)).logits.float()


def _load_stock(out: Path, inputs) -> torch.Tensor:
    """Logits of the checkpoint in `out`, loaded by stock code alone. Raises ExportError where it is not whole."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(out, dtype="auto", output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise ExportError(f"{out} does not load as a whole: {wrong}")
    return _logits(model.eval(), inputs)


def _require_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> float:
    """Relative error; ExportError above the tolerance, and for what is not finite."""
    error = float((found - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise ExportError(
            f"{what} gives other logits than the run's: relative error {error:.1e}, at most {tolerance:.0e} expected"
        )
    return error
