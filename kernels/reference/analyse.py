"""Components of tokens in a basis: the specification."""

import torch


def analyse(tokens: torch.Tensor, mean: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`(tokens - mean) * weights @ inverse`, for a token the same numbers whatever tokens are beside it.

    Here in double precision: rounded to single, a sum does not depend on the order that a shape brings with it. MPS
    has none: there the same token may get another code in rare ties.

    Args:
        tokens: `[batch, n, width]` float32.
        mean, weights: `[width]` float32.
        inverse: `[width, components]` float16.

    Returns:
        `[batch, n, components]` float32.
    """
    return multiply((tokens - mean) * weights, inverse)


def multiply(numbers: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`numbers @ inverse` as `analyse` multiplies, float32."""
    numbers = numbers.float() if numbers.device.type == "mps" else numbers.double()
    return (numbers @ inverse.to(numbers.dtype)).float()
