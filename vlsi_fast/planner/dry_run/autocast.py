"""torch.autocast's rules for CUDA, on tensors for which torch has none (those without storage).

The lists are those of PyTorch's autocast operator reference, cut to functions that models of this project call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

LOW = {
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "mv"),
    *("conv1d", "conv2d", "conv3d", "chain_matmul", "multi_dot", "einsum", "bilinear", "prelu"),
    "scaled_dot_product_attention",
}
"""Functions that run in autocast's dtype."""
HIGH = {
    *("softmax", "log_softmax", "softmin", "layer_norm", "group_norm", "rms_norm", "cross_entropy", "nll_loss"),
    *("kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "cosine_similarity", "logsumexp"),
    *("exp", "expm1", "log", "log2", "log10", "log1p", "pow", "__pow__", "__rpow__", "rsqrt", "reciprocal", "norm"),
    *("sum", "prod", "cumsum", "cumprod", "softplus", "acos", "asin", "cosh", "sinh", "tan", "erfinv", "cdist"),
}
"""Functions that run in float32."""


class Autocast:
    """Casts a function's arguments. Casts of weights are kept until the outermost `torch.autocast` ends, as torch's."""

    def __init__(self):
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Arguments of the function of that name, cast where autocast for CUDA is on and has a rule."""
        if name not in LOW and name not in HIGH or not torch.is_autocast_enabled("cuda"):
            return args, kwargs
        if kwargs.get("out") is not None or name.endswith("_") and not name.endswith("__"):
            return args, kwargs
        if name in HIGH and kwargs.get("dtype") is not None:  # set_opt_dtype: what is asked for holds
            return args, kwargs
        dtype = torch.get_autocast_dtype("cuda") if name in LOW else torch.float32
        return tree_map(lambda value: self._cast(value, dtype), (args, kwargs))

    def forget(self) -> None:
        """Autocast has ended: its copies of weights go."""
        self._kept.clear()

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta or not value.is_floating_point():
            return value
        if value.dtype in (dtype, torch.float64):
            return value
        keeps = value.requires_grad and value.is_leaf and value.dtype == torch.float32 and dtype != torch.float32
        if not keeps or not torch.is_autocast_cache_enabled():
            return value.to(dtype)
        if id(value) not in self._kept:
            self._kept[id(value)] = (value, value.to(dtype))
        return self._kept[id(value)][1]
