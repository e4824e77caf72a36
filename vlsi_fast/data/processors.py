"""Loading and building a model family's processor, on machines with and without torchvision.

The stock processors insist on a video processor, and that one needs torchvision, so without torchvision
`AutoProcessor.from_pretrained` fails on every checkpoint even though images alone need only Pillow. The classes below
are the stock processors minus video. They bear the stock names, so what they save is an ordinary checkpoint that
`AutoProcessor` loads wherever torchvision is installed.

A new family whose processor takes videos needs a class here and its entry in `_VIDEO`; others are stock.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import transformers
from transformers import AutoProcessor, ProcessorMixin
from transformers.utils import cached_file, is_num2words_available, is_torchvision_available

from vlsi_fast import hub

_PATCHES = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
_VIDEO = {
    "Qwen2VLProcessor": ("Qwen2VLVideoProcessor", _PATCHES),
    "Qwen2_5_VLProcessor": ("Qwen2VLVideoProcessor", _PATCHES),
    "Qwen3VLProcessor": ("Qwen3VLVideoProcessor", _PATCHES),
    "Glm4vProcessor": ("Glm4vVideoProcessor", _PATCHES),
    "Glm46VProcessor": ("Glm46VVideoProcessor", _PATCHES),
    "LlavaOnevisionProcessor": ("LlavaOnevisionVideoProcessor", ("size", "image_mean", "image_std")),
    "InternVLProcessor": ("InternVLVideoProcessor", ("size", "image_mean", "image_std")),
    "SmolVLMProcessor": ("SmolVLMVideoProcessor", ("size", "max_image_size", "image_mean", "image_std")),
}
"""Processor -> the class of its video part, and what that part has in common with the image part."""


class _WithoutVideo:
    """Mixed into a stock processor: it takes text and images only, and needs no torchvision."""

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
            kind, common = _VIDEO[type(self).__name__]
            section = {"video_processor_type": kind, **{key: output["image_processor"][key] for key in common}}
        output["video_processor"] = section
        return output


class Qwen2VLProcessor(_WithoutVideo, transformers.Qwen2VLProcessor):
    """Stock, minus video."""


class Qwen2_5_VLProcessor(_WithoutVideo, transformers.Qwen2_5_VLProcessor):
    """Stock, minus video."""


class Qwen3VLProcessor(_WithoutVideo, transformers.Qwen3VLProcessor):
    """Stock, minus video."""


class Glm4vProcessor(_WithoutVideo, transformers.Glm4vProcessor):
    """Stock, minus video."""


class Glm46VProcessor(_WithoutVideo, transformers.Glm46VProcessor):
    """Stock, minus video."""


class LlavaOnevisionProcessor(_WithoutVideo, transformers.LlavaOnevisionProcessor):
    """Stock, minus video."""


class InternVLProcessor(_WithoutVideo, transformers.InternVLProcessor):
    """Stock, minus video, and minus its own call, which mixes images with videos and cannot tell what it wrote for
    either."""

    __call__ = ProcessorMixin.__call__
    unused_input_names = ("num_patches",)


class SmolVLMProcessor(_WithoutVideo, transformers.SmolVLMProcessor):
    """Stock, minus video, and minus num2words, which tells how many frames a video has."""

    apply_chat_template = ProcessorMixin.apply_chat_template  # the stock one asks the video part for its defaults

    def __init__(self, image_processor, tokenizer, image_seq_len=169, chat_template=None, **kwargs):
        self.fake_image_token = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
        self.image_token = getattr(tokenizer, "image_token", "<image>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.end_of_utterance_token = getattr(tokenizer, "end_of_utterance_token", "<end_of_utterance>")
        self.global_image_token = getattr(tokenizer, "global_image_token", "<global-img>")
        video = getattr(tokenizer, "video_token", "<video>")
        self.video_token = video if video in tokenizer.get_vocab() else None  # else it is a word
        self.image_seq_len = image_seq_len
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)


_WITHOUT_VIDEO = {
    each.__name__: each
    for each in (
        *(Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor, Glm4vProcessor, Glm46VProcessor),
        *(LlavaOnevisionProcessor, InternVLProcessor, SmolVLMProcessor),
    )
}


def _takes_videos(name: str | None) -> bool:
    """Whether the stock processor of this name is used: it finds the packages that its videos need."""
    needed = {"InternVLProcessor": False, "SmolVLMProcessor": is_num2words_available()}
    return is_torchvision_available() and needed.get(name, True)


def load_processor(path: str | os.PathLike, **kwargs):
    """Loads a checkpoint's processor: `AutoProcessor` where torchvision is installed (for SmolVLM num2words as well),
    else, and always for InternVL, the one without video.

    Args:
        path: folder or hub name of the checkpoint.
        **kwargs: passed to `from_pretrained`.

    Raises:
        ImportError: the family's processor needs torchvision, which is not installed.
    """
    kwargs = hub.options(path) | kwargs
    name = _processor_class_name(path, **kwargs)
    if name in _WITHOUT_VIDEO and not _takes_videos(name):
        processor = _WITHOUT_VIDEO[name].from_pretrained(path, **kwargs)
        if processor._video_section is None:  # older checkpoints keep it in a file of its own
            processor._video_section = _read_json(path, "video_preprocessor_config.json", kwargs)
        return processor
    try:
        return AutoProcessor.from_pretrained(path, **kwargs)
    except ImportError as error:
        raise ImportError(
            f"{name or 'the processor'} of {path} needs torchvision. Install the build that matches your torch, from "
            f"torch's own index (CPU: pip install torchvision --index-url https://download.pytorch.org/whl/cpu)"
        ) from error


def build_processor(name: str, tokenizer, image_processor, chat_template: str | None = None, **fields):
    """A processor from its parts: the stock class with torchvision, else the one without video.

    Args:
        name: class of the processor, by its transformers name.
        tokenizer: fast tokenizer with the family's special tokens.
        image_processor: the family's image processor, either backend.
        chat_template: Jinja text; None leaves the processor without one.
        **fields: further fields of that class (LLaVA-OneVision: num_image_tokens, vision_feature_select_strategy).
    """
    parts = {"image_processor": image_processor, "tokenizer": tokenizer, "chat_template": chat_template, **fields}
    if name not in _WITHOUT_VIDEO:  # it takes none
        return getattr(transformers, name)(**parts)
    if not _takes_videos(name):
        return _WITHOUT_VIDEO[name](**parts)
    kind, common = _VIDEO[name]
    video = getattr(transformers, kind)(**{key: getattr(image_processor, key) for key in common})
    return getattr(transformers, name)(video_processor=video, **parts)


def build_qwen2_vl_processor(tokenizer, image_processor, chat_template: str | None = None):
    """`build_processor` for Qwen2-VL."""
    return build_processor("Qwen2VLProcessor", tokenizer, image_processor, chat_template)


def _processor_class_name(path, **kwargs) -> str | None:
    """The processor class that a checkpoint names, in any of the files that may say so."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        found = (_read_json(path, name, kwargs) or {}).get("processor_class")
        if found is not None:
            return found
    return None


def _read_json(path, name: str, kwargs: dict) -> dict | None:
    """A JSON file of a checkpoint, None where it has none; of `kwargs` those count that say where the file lies."""
    options = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
    hub = {key: kwargs[key] for key in options if key in kwargs}
    file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
