"""Components of keys and values as a model holds them: the specification."""

from __future__ import annotations

import torch

from .analyse import analyse, multiply
from .unrotate import unrotate

# bits of a float32 that hold its power of two, and of 2**-95: the least that tokens are scaled by
EXPONENT, LEAST = 0x7F800000, 0x10000000


def analyse_states(
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    mean: torch.Tensor,
    weights: torch.Tensor,
    inverse: torch.Tensor,
) -> torch.Tensor:
    """`analyse` of what `unrotate` gives; of 16 bits a state, rounded to float16 before the product.

    A state of 16 bits was rounded to 8 bits (bfloat16) or 11 (float16) when the model made it. To round it to 11 once
    more, weighted and with the mean taken off, moves it by no more than that did.

    Args:
        key_states, value_states, angles, interleaved: as of `unrotate`.
        mean, weights, inverse: as of `analyse`.

    Returns:
        `[rows, n, components]` float32.
    """
    tokens = unrotate(key_states, value_states, angles, interleaved)
    if key_states.dtype not in (torch.float16, torch.bfloat16):
        return analyse(tokens, mean, weights, inverse)
    scaled = (tokens - mean) * weights
    # the largest number of a token comes to 2**14: nearly as much as float16 holds. What is not finite stays so
    most = scaled.abs().amax(-1, keepdim=True)
    scale = (most.view(torch.int32) & EXPONENT).clamp_(min=LEAST).view(torch.float32) * 2.0**-14
    return multiply((scaled * (1 / scale)).half(), inverse) * scale
