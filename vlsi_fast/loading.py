"""Read what a stage starts from: stock checkpoints, processors, and proof that they belong together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from .backbones import default_layers, family_of
from .config import BackboneConfig, ConfigError
from .data.tokens import SharedTokens, shared_tokens


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
            folder = Path(snapshot_download(path, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
        except Exception as error:
            raise FileNotFoundError(
                f"{field}: {path} is neither a folder nor a Hub repository that can be reached ({error})"
            ) from error
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{field}: {folder} is no checkpoint: config.json or *.safetensors is missing")
    return folder


def load_model_config(settings: BackboneConfig, role: str):
    """transformers config of a role's checkpoint; ValueError for an unknown family."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolve_folder(settings.path, f"{role}.path"))
    family_of(config)
    return config


def target_layers(settings: BackboneConfig, config, role: str) -> list[int]:
    """Target layers of a role, the paper's where the config names none.

    Raises:
        ConfigError: a layer beyond the model's depth.
    """
    depth = config.get_text_config().num_hidden_layers
    layers = settings.layers if settings.layers is not None else default_layers(depth)
    outside = [k for k in layers if not 1 <= k <= depth]
    if outside:
        raise ConfigError(
            f"{role}.layers: {outside} out of range; {settings.path} has {depth} decoder layers: use 1 .. {depth}"
        )
    return list(layers)


def load_backbone(folder: str | Path, dtype: str, attn_implementation: str = "sdpa"):
    """A stock model in eval mode with frozen weights (sharded while loading under ZeRO-3).

    Random numbers drawn on the way are given back: under ZeRO-3 LLaVA-OneVision draws some that are overwritten, and
    what is initialised after it (verbalizers, LoRA) would not start as in a run without ZeRO-3.
    """
    from transformers import AutoModelForImageTextToText

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
        )
    return model.requires_grad_(False).eval()


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
            "VLsI needs one tokenizer: choose models of one family, or of families that share it"
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


def checkpoint_digest(folder: Path) -> str:
    """sha256 of a checkpoint's config and `weights_digest`: tells checkpoints apart, large ones by samples."""
    config = json.loads((folder / "config.json").read_text())
    for volatile in ("transformers_version", "_name_or_path"):
        config.pop(volatile, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode() + weights_digest(folder).encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """sha256 over a folder's safetensors: of each the tensor table and 64 blocks spread evenly over the weights.

    All of a file up to 4 MiB is read. The blocks are spread because a stage may leave a stretch of a file as it was,
    such as the vision tower at its end.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = stream.read(8)
            digest.update(header + stream.read(int.from_bytes(header, "little")))
            begin, block = stream.tell(), 65536
            spare = max(0, file.stat().st_size - begin - block)
            for start in sorted({begin + min(spare, i * max(block, -(-spare // 63))) for i in range(64)}):
                stream.seek(start)
                digest.update(stream.read(block))
    return digest.hexdigest()
