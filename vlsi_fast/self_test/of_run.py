"""Which probes a stage needs: those of the parts that it will use, at its models' widths, in its dtype."""

from __future__ import annotations

from collections.abc import Collection

import torch

from vlsi_kernels import resolve_impl

from ..acceleration import LIGER_NAMES, LIGER_NORMS_ALONE
from ..config import RunConfig
from . import backbone, operators
from .probe import Probe


def probes_of(
    config: RunConfig,
    stage: str,
    models: dict[str, object],
    *,
    device: torch.device,
    attention: dict[str, str],
    liger: Collection[str],
    widened: bool,
) -> list[Probe]:
    """The probes of a stage, none twice.

    Args:
        config: of the run.
        stage: verbalize, interact or sft.
        models: role -> transformers config, of the models that the stage runs, and of the student through which a
            teacher speaks.
        device: that it runs on.
        attention: role -> transformers name of its attention.
        liger: roles whose language models get liger-kernel's modules.
        widened: trained weights are float32 beside a bfloat16 run (without DeepSpeed), and norms then compute in it.
    """
    dtype = getattr(torch, config.dtype)
    found = _of_operators(config, stage, models, dtype, device)
    for role, model in models.items():
        if role in liger:
            found += _of_liger(model.get_text_config(), dtype, widened)
        if backbone.is_known(attention[role]):
            found += _of_attention(attention[role], role, model, dtype)
    return list({(probe.name, probe.option, probe.dtype): probe for probe in found}.values())


def _of_operators(config: RunConfig, stage: str, models: dict, dtype: torch.dtype, device: torch.device) -> list[Probe]:
    impl = resolve_impl(config.impl, device)
    if impl == "reference":
        return []
    text = {role: model.get_text_config() for role, model in models.items()}
    width = {role: t.hidden_size for role, t in text.items()}
    voices = dict(text)  # models through whose heads the roles speak
    if config.verbalizer.translates and "teacher" in text:
        voices["teacher"] = text["student"]
    said = {role: t.hidden_size for role, t in voices.items()}
    vocabulary = min(operators.VOCABULARY, *(t.vocab_size for t in voices.values()))
    options = {"dtype": dtype, "impl": impl, "vocabulary": vocabulary}
    if stage == "sft":
        return [operators.cross_entropy(width["student"], trained_head=config.sft.method == "full", **options)]
    found = []
    if stage == "verbalize":
        speakers = [role for role in models if role in config.verbalize.models]
        for role in speakers:
            if config.verbalize.objective == "answers":
                found.append(operators.cross_entropy(said[role], trained_head=False, **options))
            else:
                found.append(operators.layer_kl(said[role], said[role], **options))
    else:
        interact = config.interact
        speakers = list(models) if interact.headless else [role for role in config.speakers if role in models]
        # of a teacher on disk the width is not known here: the student's takes the same kernels
        other = said.get("teacher", width["student"])
        pair = {"student": width["student"], "teacher": other, "temperature": interact.temperature}
        if interact.matches_by_kl or interact.last_by_forward_kl:
            found.append(operators.layer_kl(**pair, **options))
        if interact.layers_by_other_divergence or interact.last_by_other_divergence:
            found.append(operators.divergence(**pair, beta=interact.beta, **options))
        if interact.learns_answers:
            found.append(operators.cross_entropy(width["student"], trained_head=False, **options))
    for role in speakers:
        wide = width["teacher"] if stage == "interact" and config.interact.headless else said[role]
        found += _of_verbalizers(config.verbalizer.architecture, text[role], wide, dtype, impl)
    return found


def _of_verbalizers(architecture: str, text, out: int, dtype: torch.dtype, impl: str) -> list[Probe]:
    """Of a role's: all blocks end at its own width but the last, which ends at `out`."""
    width, kind = text.hidden_size, architecture.removesuffix("_x2")
    inner = {"verb_ffn": out, "ffn": text.intermediate_size}.get(kind)
    if inner is None:
        return []
    counts = (operators.TOKENS, operators.MANY_TOKENS) if impl == "triton" else (operators.TOKENS,)
    ends = [out] if architecture == kind else [width, out]
    return [operators.feed_forward(width, inner, end, dtype, impl, tokens) for end in ends for tokens in counts]


def _of_liger(text, dtype: torch.dtype, widened: bool) -> list[Probe]:
    kind = LIGER_NAMES.get(text.model_type)
    if kind is None:
        return []
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    widths = [text.hidden_size] + ([head] if kind.startswith("qwen3") else [])  # Qwen3 has norms of queries and keys
    dtypes = [dtype] + ([torch.float32] if widened and dtype != torch.float32 else [])
    found = [backbone.liger_rms_norm(width, text.rms_norm_eps, d) for width in widths for d in dtypes]
    if kind not in LIGER_NORMS_ALONE:
        found.append(backbone.liger_swiglu(text.intermediate_size, dtype))
    if text.model_type == kind:  # as `apply_liger`
        found.append(backbone.liger_rope(text.num_attention_heads, text.num_key_value_heads, head, dtype))
    return found


def _of_attention(name: str, role: str, model, dtype: torch.dtype) -> list[Probe]:
    option, text, vision = f"{role}.attn_implementation", model.get_text_config(), model.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
    width = (getattr(vision, "embed_dim", None) or vision.hidden_size) // heads
    # towers that merge patches take all images in one sequence with their bounds, sdpa excepted; others one an entry
    bounds = hasattr(vision, "spatial_merge_size") and name != "sdpa"
    return [
        backbone.attention(name, option, text.num_attention_heads, text.num_key_value_heads, head, dtype, True),
        backbone.attention(name, option, heads, heads, width, dtype, False, packed=bounds),
    ]
