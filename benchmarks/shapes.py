"""Sizes of the models that the operators are measured at.

    N tokens, V vocabulary, D width; S / L student / teacher target layers

A shape is named `TEACHER-to-STUDENT:TOKENS`, such as `72b-to-7b:4096`; without tokens, 4096. Besides: `cpu`, the shape
of the CPU bars, `small`, for memory on a CPU, and `tiny`, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = (512, 1024, 2048, 4096, 8192)
"""Answer tokens of a micro-batch."""
RAGGED = 1531
"""A prime: no block size divides it."""
VOCABULARIES = (151936, 152064)
"""Rows of the heads. One vocabulary with two paddings: only the first 151936 rows take part."""


@dataclass(frozen=True)
class Backbone:
    """Sizes of one language model."""

    width: int
    ffn: int  # inner width of the feed-forward network
    depth: int  # decoder layers
    heads: int
    kv_heads: int
    vocab: int  # rows of the head
    tied: bool  # whether the head is the embedding
    target_layers: tuple[int, ...]


_SHALLOW, _DEEP = tuple(range(2, 28, 4)), tuple(range(2, 80, 4))

BACKBONES = {
    "0.5b": Backbone(896, 4864, 24, 14, 2, 151936, True, (4, 12, 20)),  # LLaVA-OV (Qwen2-0.5B)
    "2b": Backbone(1536, 8960, 28, 12, 2, 151936, True, _SHALLOW),  # Qwen2-VL from here on
    "7b": Backbone(3584, 18944, 28, 28, 4, 152064, False, _SHALLOW),
    "72b": Backbone(8192, 29568, 80, 64, 8, 152064, False, _DEEP),
}


@dataclass(frozen=True)
class Vision:
    """Qwen2-VL's vision tower, the same at every size of the language model."""

    width: int = 1280
    depth: int = 32
    heads: int = 16
    mlp_ratio: int = 4
    patch: int = 14
    merge: int = 2  # patches a side that become one token


VISION = Vision()


@dataclass(frozen=True)
class Shape:
    """One interaction head: what the vocabulary operators see."""

    name: str
    tokens: int
    student_width: int
    teacher_width: int
    student_layers: int
    teacher_layers: int
    student_rows: int  # rows of the student's head
    teacher_rows: int

    @property
    def vocab(self) -> int:
        """Rows of both heads that take part."""
        return min(self.student_rows, self.teacher_rows)


_SPECIAL = {
    "cpu": Shape("cpu", 512, 256, 512, 5, 10, 151936, 151936),
    "small": Shape("small", 128, 64, 128, 2, 6, 65536, 65536),
    "tiny": Shape("tiny", 8, 16, 24, 2, 3, 500, 512),
}


def shape(name: str) -> Shape:
    """The shape of a name. Raises ValueError with the names that exist."""
    base, _, tokens = name.partition(":")
    if tokens and not (tokens.isdigit() and int(tokens) > 0):
        raise ValueError(f"shape {name!r}: {tokens!r} is no number of tokens; write e.g. 7b-to-2b:4096")
    if base in _SPECIAL:
        found = _SPECIAL[base]
        fields = vars(found) | ({"name": name, "tokens": int(tokens)} if tokens else {})
        return Shape(**fields)
    teacher, _, student = base.partition("-to-")
    if teacher not in BACKBONES or student not in BACKBONES:
        known = ", ".join([*_SPECIAL, *(f"TEACHER-to-STUDENT of {' '.join(BACKBONES)}",)])
        raise ValueError(f"shape {name!r} is unknown; there are {known}, each with :TOKENS behind it if wanted")
    t, s = BACKBONES[teacher], BACKBONES[student]
    if len(s.target_layers) > len(t.target_layers) or s.width > t.width:
        raise ValueError(f"shape {name!r}: the teacher must be the larger model; write {student}-to-{teacher}")
    layers = len(s.target_layers), len(t.target_layers)
    return Shape(name, int(tokens or 4096), s.width, t.width, *layers, s.vocab, t.vocab)
