"""The small networks of a learned compressor: the specification (arXiv 2602.08005, section 3.2).

    linear      weight                     y = W x
    mlp_gelu    0.weight, 2.weight         y = W2 gelu(W0 x), the exact gelu
    mlp_swiglu  w12.weight, w3.weight      y = W3 (silu(a) * b), a and b the first and the second half of W12 x

Each weight may have a bias beside it (`bias`, `0.bias`, ...). These are the names in published checkpoints.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

# names of the linear maps of each kind, in the order in which they are applied
LINEAR_MAPS = {"linear": ("",), "mlp_gelu": ("0.", "2."), "mlp_swiglu": ("w12.", "w3.")}


def feed_forward(x: torch.Tensor, weights: Mapping[str, torch.Tensor], kind: str) -> torch.Tensor:
    """Applies a network to the last axis of `x`, in the dtype of `x`.

    Args:
        x: `[..., in_width]`, floating.
        weights: by the names above, `[out, in]` each and biases `[out]`, of any floating dtype.
        kind: one of `LINEAR_MAPS`.

    Returns:
        `[..., out_width]`.
    """
    names = LINEAR_MAPS[kind]
    hidden = _linear(x, weights, names[0])
    if kind == "linear":
        return hidden
    if kind == "mlp_gelu":
        return _linear(F.gelu(hidden), weights, names[1])
    gate, value = hidden.chunk(2, dim=-1)
    return _linear(F.silu(gate) * value, weights, names[1])


def _linear(x: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    weight, bias = weights[f"{name}weight"], weights.get(f"{name}bias")
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
