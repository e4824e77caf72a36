"""Operators for distilling language heads layer by layer, without logits ever being held.

    head_statistics, merge_head_statistics      the streaming primitive, and its merge over vocabulary shards
    linear_logsumexp, linear_cross_entropy      head and loss in one
    linear_divergence                           KL either way, or Jensen-Shannon, of one head from another
    teacher_targets, layer_kl_matrix            KLs of all pairs of teacher and student layers
    verb_ffn                                    the verbalizer's gated feed-forward network
    FrozenHead                                  a head that is not trained, converted for the fused kernels once

Usable without the trainer; needs only PyTorch, and Triton for its GPU kernels. Dense float64 references stand beside
each operator.
"""

from ._common import DEFAULT_WORKSPACE_BYTES, VocabularyShard, resolve_impl
from .frozen_head import FrozenHead
from .head_statistics import HeadStatistics, head_statistics, merge_head_statistics
from .layer_kl import TeacherTargets, layer_kl_matrix, teacher_targets
from .linear_cross_entropy import linear_cross_entropy, linear_logsumexp
from .linear_divergence import linear_divergence
from .verb_ffn import verb_ffn

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_WORKSPACE_BYTES",
    "FrozenHead",
    "HeadStatistics",
    "TeacherTargets",
    "VocabularyShard",
    "head_statistics",
    "layer_kl_matrix",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logsumexp",
    "merge_head_statistics",
    "resolve_impl",
    "teacher_targets",
    "verb_ffn",
]
