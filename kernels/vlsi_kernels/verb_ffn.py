"""Gated feed-forward network of a verbalizer (SwiGLU), for one layer or for a stack of layers at once.

    g = x gate^T,  u = x up^T,  a = silu(g) * u,  y = a down^T          silu(g) = g sigmoid(g)

Shapes: x [.., Din], gate and up [Dh, Din], down [Dout, Dh] -> y [.., Dout]; or all with a leading layer axis K:
x [K, .., Din], gate and up [K, Dh, Din], down [K, Dout, Dh] -> y [K, .., Dout]. Dh hidden width.
Backward keeps x, g and u and computes a again; between the products everything is float32, rounded once.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import check_same_device, check_tensor, resolve_impl

# ---- reference ----


def reference_verb_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """float64 oracle, differentiable by autograd; same shapes as `verb_ffn`, float64 result."""
    x, gate, up, down = (t.double() for t in (x, gate, up, down))
    rows = x.flatten(1, -2) if gate.dim() == 3 else x
    y = (torch.nn.functional.silu(rows @ gate.mT) * (rows @ up.mT)) @ down.mT
    return y.reshape(*x.shape[:-1], down.shape[-2])


# ---- implementation ----


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


class _VerbFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g, u = x @ gate.mT, x @ up.mT  # [.., R, Dh]
        ctx.save_for_backward(x, gate, up, down, g, u)
        return torch.nn.functional.silu(_wide(g)).mul_(_wide(u)).to(x.dtype) @ down.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, gate, up, down, g, u = ctx.saved_tensors
        need_x, need_gate, need_up, need_down = ctx.needs_input_grad
        g32, u32 = _wide(g), _wide(u)
        sigmoid = g32.sigmoid()
        silu = g32 * sigmoid
        grad_x = grad_gate = grad_up = grad_down = None
        if need_down:
            grad_down = grad.mT @ (silu * u32).to(x.dtype)
        if need_x or need_gate or need_up:
            grad_a = _wide(grad @ down)
            grad_u = (grad_a * silu).to(x.dtype)
            grad_g = (grad_a * u32 * (sigmoid + silu * (1 - sigmoid))).to(x.dtype)
            grad_gate = grad_g.mT @ x if need_gate else None
            grad_up = grad_u.mT @ x if need_up else None
            grad_x = grad_g @ gate + grad_u @ up if need_x else None
        return grad_x, grad_gate, grad_up, grad_down


# ---- public function ----


def verb_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, impl: str = "auto") -> Tensor:
    """down(silu(gate x) * up x): the verbalizer's network (VLsI, table 4f, verb-FFN). Differentiable in everything.

    Args:
        x: [.., Din], or [K, .., Din] for stacked weights; float32, bfloat16, float16 or float64.
        gate, up: [Dh, Din], or [K, Dh, Din].
        down: [Dout, Dh], or [K, Dout, Dh].
        impl: "auto" and "torch": as above; "reference": float64 inside.

    Returns: [.., Dout] in x's dtype; under autocast all are converted to its dtype first, as a linear layer would.

    Raises:
        ValueError: shapes that do not fit, several devices, differing dtypes outside autocast, unknown impl.
        TypeError: dtypes other than the four. NotImplementedError: impl="triton".
    """
    x, gate, up, down = _checked(x, gate, up, down)
    if resolve_impl(impl, x.device) == "reference":
        return reference_verb_ffn(x, gate, up, down).to(x.dtype)
    rows = x.flatten(1, -2) if gate.dim() == 3 else x[None].flatten(0, -2)
    with torch.autocast(device_type=x.device.type, enabled=False):
        y = _VerbFFN.apply(rows, gate, up, down)
    return y.view(*x.shape[:-1], down.shape[-2])


def _checked(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs after checks, in autocast's dtype where autocast is on."""
    lead = ("K",) if gate.dim() == 3 else ()
    check_tensor("gate", gate, (*lead, "Dh", "Din"))
    check_tensor("up", up, (*lead, "Dh", "Din"))
    check_tensor("down", down, (*lead, "Dout", "Dh"))
    check_tensor("x", x, ("..",) * max(x.dim(), len(lead) + 1) if x.dim() else ("Din",))
    check_same_device(x=x, gate=gate, up=up, down=down)
    if up.shape != gate.shape or down.shape[-1] != gate.shape[-2] or down.shape[:-2] != gate.shape[:-2]:
        raise ValueError(
            f"gate {list(gate.shape)}, up {list(up.shape)} and down {list(down.shape)} do not fit; they must be "
            "[.., Dh, Din] twice and [.., Dout, Dh]"
        )
    if x.shape[-1] != gate.shape[-1]:
        raise ValueError(f"x has width {x.shape[-1]} but gate and up take {gate.shape[-1]}")
    if lead and (x.dim() < 3 or x.shape[0] != gate.shape[0]):
        raise ValueError(
            f"stacked weights hold {gate.shape[0]} layers, so x must be [{gate.shape[0]}, .., {gate.shape[-1]}], got "
            f"{list(x.shape)}; stack the layers' inputs on axis 0"
        )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), gate.to(dtype), up.to(dtype), down.to(dtype)
    if not x.dtype == gate.dtype == up.dtype == down.dtype:
        raise ValueError(
            f"x is {x.dtype}, gate {gate.dtype}, up {up.dtype}, down {down.dtype}; convert them to one dtype, "
            "or use autocast"
        )
    return x, gate, up, down
