"""Which tokens two tokenizers share, and whether the rest can be left out of a distillation.

Families built on one tokenizer add special tokens of their own behind it: LLaVA-OneVision has `<image>` and `<video>`
where Qwen2-VL has `<|object_ref_start|>` and `<|object_ref_end|>`. They stand in prompts, never in answers, so the two
models can still be compared: on the ids below the first that differs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SharedTokens:
    """What two tokenizers have in common."""

    differing: dict[str, tuple[int | None, int | None]]
    """Token -> its ids in the first and in the second tokenizer, None where it has none; in the order of the ids."""
    limit: int | None
    """First id that differs: all ids below it stand for the same token in both. None: the two are the same."""
    problem: str | None
    """Why the two cannot be compared; None where they can."""


def shared_tokens(first, second) -> SharedTokens:
    """Compare two tokenizers' complete vocabularies.

    They can be compared where every token whose ids differ is a special token that ends no answer, behind all that they
    share.

    Args:
        first, second: Hugging Face tokenizers.
    """
    a, b = first.get_vocab(), second.get_vocab()
    if a == b:
        return SharedTokens({}, None, None)

    def lowest(token: str) -> int:
        return min(vocab[token] for vocab in (a, b) if token in vocab)

    names = sorted((t for t in a.keys() | b.keys() if a.get(t) != b.get(t)), key=lambda t: (lowest(t), t))
    limit = lowest(names[0])
    problem = None
    special = [{str(t) for t in tok.added_tokens_decoder.values() if t.special} for tok in (first, second)]
    plain = [t for t in names if (t in a and t not in special[0]) or (t in b and t not in special[1])]
    ends = sorted({str(t.eos_token) for t in (first, second)} & set(names))
    behind = sorted((i, t) for t, i in a.items() if i >= limit and b.get(t) == i)
    if plain:
        problem = f"{plain[0]!r} is an ordinary token, which answers may hold"
    elif ends:
        problem = f"{ends[0]!r} ends a turn, so every answer holds it"
    elif behind:
        problem = f"{behind[0][1]!r} lies behind the first difference (id {limit}) and would be cut off"
    return SharedTokens({t: (a.get(t), b.get(t)) for t in names}, limit, problem)
