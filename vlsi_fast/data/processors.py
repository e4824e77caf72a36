"""Loading and building a model family's processor, on machines with and without torchvision.

The stock Qwen2-VL processor insists on a video processor, and that one needs torchvision, so without torchvision
`AutoProcessor.from_pretrained` fails on every Qwen2-VL checkpoint even though images alone need only Pillow. The class
below is the stock processor minus video. It bears the stock name, so what it saves is an ordinary checkpoint that
`AutoProcessor` loads wherever torchvision is installed.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import transformers
from transformers import AutoProcessor
from transformers.utils import cached_file, is_torchvision_available

_COPIED_TO_VIDEO = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")


class Qwen2VLProcessor(transformers.Qwen2VLProcessor):
    """The stock Qwen2-VL processor for text and images; it takes no videos and needs no torchvision."""

    _video_section: dict | None = None

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that this processor is made of."""
        return ["image_processor", "tokenizer"]

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        """Builds the processor and remembers the checkpoint's video section, to save it again unchanged."""
        made = super().from_args_and_dict(args, processor_dict, **kwargs)
        processor = made[0] if isinstance(made, tuple) else made
        processor._video_section = copy.deepcopy(processor_dict.get("video_processor"))
        return made

    def to_dict(self) -> dict:
        """The stock processor's dictionary, video section included."""
        output = super().to_dict()
        section = copy.deepcopy(self._video_section)
        if section is None:
            shared = {key: output["image_processor"][key] for key in _COPIED_TO_VIDEO}
            section = {"video_processor_type": "Qwen2VLVideoProcessor", **shared}
        output["video_processor"] = section
        return output


_WITHOUT_VIDEO = {"Qwen2VLProcessor": Qwen2VLProcessor}


def load_processor(path: str | os.PathLike, **kwargs):
    """Loads a checkpoint's processor: `AutoProcessor` where torchvision is installed, else the one without video.

    Args:
        path: folder or hub name of the checkpoint.
        **kwargs: passed to `from_pretrained`.

    Raises:
        ImportError: the family's processor needs torchvision, which is not installed.
    """
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(path, **kwargs)
    name = _processor_class_name(path, **kwargs)
    if name in _WITHOUT_VIDEO:
        return _WITHOUT_VIDEO[name].from_pretrained(path, **kwargs)
    try:
        return AutoProcessor.from_pretrained(path, **kwargs)
    except ImportError as error:
        raise ImportError(
            f"{name or 'the processor'} of {path} needs torchvision. Install the build that matches your torch, from "
            f"torch's own index (CPU: pip install torchvision --index-url https://download.pytorch.org/whl/cpu)"
        ) from error


def build_qwen2_vl_processor(tokenizer, image_processor, chat_template: str | None = None):
    """A Qwen2-VL processor from its parts: the stock class with torchvision, else the one without video.

    Args:
        tokenizer: fast tokenizer with the Qwen2-VL special tokens.
        image_processor: a Qwen2-VL image processor, either backend.
        chat_template: Jinja text; None leaves the processor without one.
    """
    parts = {"image_processor": image_processor, "tokenizer": tokenizer, "chat_template": chat_template}
    if not is_torchvision_available():
        return Qwen2VLProcessor(**parts)
    shared = {key: getattr(image_processor, key) for key in _COPIED_TO_VIDEO}
    video = transformers.Qwen2VLVideoProcessor(**shared)
    return transformers.Qwen2VLProcessor(video_processor=video, **parts)


def _processor_class_name(path, **kwargs) -> str | None:
    """The processor class that a checkpoint names, in any of the files that may say so."""
    options = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
    hub = {key: kwargs[key] for key in options if key in kwargs}
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
        if file is not None:
            found = json.loads(Path(file).read_text(encoding="utf-8")).get("processor_class")
            if found is not None:
                return found
    return None
