"""Read what a stage starts from: stock checkpoints, processors, and proof that they belong together."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch
from torch import nn

from . import hub
from .attention import VARLEN, set_varlen
from .backbones import default_layers, family_of, require_plain_logits
from .config import BackboneConfig, ConfigError, RunConfig
from .data.tokens import SharedTokens, shared_tokens
from .ranks.shard_loading import load_sharded, read_parameter
from .shrinking.record import auto_layers
from .terminal import hush_bars

hush_bars()


def resolve_folder(path: str, field: str) -> Path:
    """A local folder of a checkpoint: `path` itself, or the snapshot of a Hub repository.

    Raises:
        FileNotFoundError: neither, or a folder without a model in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
            raise FileNotFoundError(f"{field}: folder {path} does not exist; give a checkpoint folder or a Hub name")
        from huggingface_hub import snapshot_download

        try:
            ignored = ["*.bin", "*.pth", "*.gguf"]
            folder = Path(snapshot_download(path, ignore_patterns=ignored, **hub.options(path)))
        except Exception as error:
            raise FileNotFoundError(f"{field}: no folder, and {hub.explain(path, error)}") from error
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{field}: {folder} is no checkpoint: config.json or *.safetensors is missing")
    return folder


def load_model_config(settings: BackboneConfig, role: str):
    """transformers config of a role's checkpoint; ValueError for an unknown family, or one whose logits are capped."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolve_folder(settings.path, f"{role}.path"))
    require_plain_logits(config)
    family_of(config)
    return config


def target_layers(
    settings: BackboneConfig, config, role: str, run: RunConfig | None = None, folder: Path | None = None
) -> list[int]:
    """Target layers of a role, the paper's where the config names none.

    Args:
        settings: the role's section.
        config: transformers config of its model.
        role: student or teacher.
        run: the whole config, which `layers: auto` needs.
        folder: the role's checkpoint, where it is at hand; with auto a teacher there must be the one that was shrunk.

    Raises:
        ConfigError: a layer beyond the model's depth, or auto without a shrunk student.
    """
    depth = config.get_text_config().num_hidden_layers
    layers = settings.layers if settings.layers is not None else default_layers(depth)
    if layers == "auto":
        layers = auto_layers(run, role, depth, folder)
    outside = [k for k in layers if not 1 <= k <= depth]
    if outside:
        raise ConfigError(
            f"{role}.layers: {outside} out of range; {settings.path} has {depth} decoder layers: use 1 .. {depth}"
        )
    return list(layers)


def needed_depth(config, layers: list[int]) -> int:
    """Decoder layers that must run for the target layers' states.

    One more than the deepest where the family adds to that layer's output: the state is read at the next layer.
    """
    deepest = max(layers)
    return deepest + (deepest <= family_of(config).layers_added_to(config))


def load_backbone(
    folder: str | Path,
    dtype: str,
    attn_implementation: str = "sdpa",
    depth: int | None = None,
    zero: dict | None = None,
    **options,
) -> nn.Module:
    """A stock model in eval mode with frozen weights (under ZeRO-3 sharded while loading, see `ranks.shard_loading`).

    Random numbers drawn on the way are given back: under ZeRO-3 LLaVA-OneVision draws some that are overwritten, and
    what is initialised after it (verbalizers, LoRA) would not start as in a run without ZeRO-3.

    Args:
        folder: checkpoint.
        dtype: of the weights, by torch's name.
        attn_implementation: by its transformers name, `attention.VARLEN` as well.
        depth: keep only so many decoder layers, the shallow ones; the others are never read. None: all.
        zero: DeepSpeed config to shard it by; None: the run's own, where that is ZeRO-3.
        options: further arguments of `from_pretrained` (for a model that is not sharded).

    Raises:
        ValueError: the checkpoint lacks tensors.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    full, config = (AutoConfig.from_pretrained(folder) for _ in range(2))
    if depth is not None:
        cut_config(config, depth)
    is_cut = config.get_text_config().num_hidden_layers < full.get_text_config().num_hidden_layers
    if zero is None and is_deepspeed_zero3_enabled():
        zero = deepspeed_config()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    varlen = attn_implementation == VARLEN
    stock = "sdpa" if varlen else attn_implementation
    if zero is not None:
        with torch.random.fork_rng(devices=devices):
            model = load_sharded(folder, config, full, getattr(torch, dtype), stock, zero)
        if varlen:
            set_varlen(model)
        return model.requires_grad_(False)
    quiet = _without_load_report() if is_cut else contextlib.nullcontext()
    with quiet, torch.random.fork_rng(devices=devices):
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=stock,
            output_loading_info=True,
            **options,
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors of its model ({', '.join(missing[:10])}): use a whole checkpoint"
        )
    if varlen:
        set_varlen(model)
    return model.requires_grad_(False).eval()


def read_head(folder: str | Path, config, dtype: str | None = None) -> torch.Tensor:
    """[V, d] language head of a checkpoint, in CPU memory; nothing else of it is read. `dtype` None: as stored."""
    weight = read_parameter(folder, config, lambda model: family_of(config).head(model).weight)
    return weight if dtype is None else weight.to(getattr(torch, dtype))


def cut_config(config, depth: int) -> None:
    """Make a transformers config describe the model with only its first `depth` decoder layers."""
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    text.num_hidden_layers = min(depth, text.num_hidden_layers)


@contextlib.contextmanager
def _without_load_report():
    """transformers reports the tensors of layers that were left out as unexpected: hundreds of lines that alarm."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def require_same_tokens(student, teacher, student_name: str, teacher_name: str) -> SharedTokens:
    """Both tokenizers must give every token the same id (section 4.4: equal sizes are not enough).

    Only special tokens that no answer holds may differ, such as `<image>` of LLaVA-OneVision.

    Returns:
        What differs, and the first id that does.

    Raises:
        ConfigError: names both sides and the first differences.
    """
    found = shared_tokens(student, teacher)
    if found.problem is not None:
        shown = "; ".join(f"{token!r}: {s} and {t}" for token, (s, t) in list(found.differing.items())[:3])
        raise ConfigError(
            f"student ({student_name}) and teacher ({teacher_name}) give {len(found.differing)} tokens different ids "
            f"(student and teacher: {shown}). Special tokens may differ, but {found.problem}. "
            "Layers that speak their own model's language need one tokenizer: set verbalizer.language to student, or "
            "choose models of one family, or of families that share it"
        )
    return found


def shared_rows(rows: list[int], tokens: SharedTokens) -> int:
    """Rows of the heads to compare: those that all heads have (`rows` of each) and that stand for the same tokens."""
    return min(rows) if tokens.limit is None else min(*rows, tokens.limit)


def tokenizer_digest(tokenizer) -> str:
    """sha256 over (id, token) pairs and the chat template: two equal digests encode text alike."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{index}\t{token}\n".encode())
    digest.update(str(tokenizer.chat_template).encode())
    return digest.hexdigest()
