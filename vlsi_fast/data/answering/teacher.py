"""The model that answers: which one it is, and loading it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from ...acceleration import attention_name
from ...attention import VARLEN
from ...config import QUANTIZED, ConfigError, RunConfig, load_config
from ...config_data import DataConfig
from ...lineage import checkpoint_digest
from ...loading import load_backbone, resolve_folder
from ...teacher import quantization, resolve_mode
from ..encoding import configure_image_bounds
from ..processors import load_processor


@dataclass(frozen=True)
class Teacher:
    """A checkpoint, and how it is held."""

    folder: Path
    name: str
    """As the user wrote it."""
    digest: str
    """`lineage.checkpoint_digest`."""
    dtype: str
    quantized: str | None
    """int8 or nf4."""
    attention: str
    device: torch.device
    spread: bool
    """Over all GPUs of this process, by accelerate."""
    bounds: dict[str, dict[str, int | None]]
    """Section of the config -> its bounds on images."""
    data: DataConfig | None
    """Of the config; None without one."""

    @classmethod
    def of(
        cls, config: RunConfig | str | Path | None, model: str | Path | None, dtype: str | None, device: str | None
    ) -> Teacher:
        """The teacher of a config, or `model` with the config's bounds on images and rows.

        Raises:
            ConfigError: neither is given, or `teacher.mode` cannot answer.
            FileNotFoundError: no checkpoint there.
        """
        if isinstance(config, str | Path):
            config = load_config(config)
        if config is None and model is None:
            raise ConfigError("say who answers: --config FILE (its teacher), or --model FOLDER")
        name, field = (str(model), "--model") if model is not None else (config.teacher.path, "teacher.path")
        folder = resolve_folder(name, field)
        given, device = device, torch.device(device or _default_device())
        if dtype is None:
            on_cpu = device.type == "cpu"
            dtype = config.dtype if config is not None else "float32" if on_cpu else "bfloat16"
        own = config is not None and model is None
        mode = resolve_mode(_mode(config.teacher.mode), device) if own else "replicated"
        asked = config.teacher.attn_implementation if own else "auto"
        attention = "auto" if asked == VARLEN else asked  # rows are padded here
        bounds: dict[str, dict[str, int | None]] = {}
        if config is not None:
            sections = {"data": config.data} | ({"teacher": config.teacher} if own else {})
            bounds = {k: {"min_pixels": s.min_pixels, "max_pixels": s.max_pixels} for k, s in sections.items()}
        return cls(
            folder=folder,
            name=name,
            digest=checkpoint_digest(folder),
            dtype=dtype,
            quantized=mode if mode in QUANTIZED else None,
            attention=attention_name(attention, dtype, device, False, AutoConfig.from_pretrained(folder)),
            device=device,
            bounds=bounds,
            data=None if config is None else config.data,
            spread=given is None and "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1,
        )

    def describe(self) -> dict[str, Any]:
        """What the answers follow from, of the model."""
        return {"name": self.name, "digest": self.digest, "dtype": self.dtype, "quantized": self.quantized}

    def load(self) -> tuple[nn.Module, Any]:
        """Model and processor."""
        processor = load_processor(self.folder)
        for section, bounds in self.bounds.items():
            configure_image_bounds(processor, **bounds, section=section)
        options: dict[str, Any] = {}
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            options["device_map"] = "auto" if self.spread else {"": self.device}  # tensor by tensor to where it stays
        if self.quantized:
            options["quantization_config"] = quantization(self.folder, self.quantized)
        model = load_backbone(self.folder, self.dtype, self.attention, **options)
        return model if options else model.to(self.device), processor


def _default_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _mode(mode: str) -> str:
    """`teacher.mode` for answering, where each rank holds a whole model and reads all of it once a token."""
    if mode in ("zero3", "offload"):
        raise ConfigError(
            f"teacher.mode {mode} cannot answer: all weights would move once a token. Use --teacher.mode replicated "
            "(whole on each rank's GPU; over all GPUs where one process is started without a launcher), int8 or nf4"
        )
    return mode
