"""`vector_dequantize` in one pass, to the same bits as the reference."""

import math

import torch
import triton
import triton.language as tl

from ..reference.vector_quantize import Groups, group_runs

TILE = {"BLOCK_TOKENS": 16, "BLOCK_COMPONENTS": 128, "num_warps": 4}


@triton.jit(do_not_specialize=["num_tokens", "num_bytes", "num_components", "num_coded"])
def pick_kernel(
    codes,  # [tokens, bytes] uint8
    table,  # [entries] int16
    first_component,  # [groups] int32
    first_entry,  # [groups] int32
    sizes,  # [groups] int32
    byte_idx,  # [groups] int32
    group_idx,  # [coded components] int32, the group of each; below 0: none
    scale,  # [components] float32
    out,  # [tokens, components] float32
    num_tokens,
    num_bytes,
    num_components,
    num_coded,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COMPONENTS: tl.constexpr,
):
    token = (tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    component = tl.program_id(0) * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
    is_token, is_component = token < num_tokens, component < num_components
    group = tl.load(group_idx + component, mask=component < num_coded, other=-1)
    is_coded = group >= 0
    size, byte = tl.load(sizes + group, mask=is_coded, other=0), tl.load(byte_idx + group, mask=is_coded, other=0)
    entry = tl.load(first_entry + group, mask=is_coded, other=0) + component
    entry -= tl.load(first_component + group, mask=is_coded, other=0)
    is_read = is_token[:, None] & is_coded[None, :]
    code = tl.load(codes + token[:, None] * num_bytes + byte[None, :], mask=is_read, other=0).to(tl.int32)
    number = tl.load(table + entry[None, :] + code * size[None, :], mask=is_read, other=0).to(tl.float32)
    number = number * tl.load(scale + component, mask=is_component, other=0.0)[None, :]
    place = out + token[:, None] * num_components + component[None, :]
    tl.store(place, number, mask=is_token[:, None] & is_component[None, :])


def vector_dequantize(
    codes: torch.Tensor,
    starts: list[int],
    tables: list[torch.Tensor],
    scale: torch.Tensor,
    scratch: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> torch.Tensor:
    """See `reference.vector_dequantize`."""
    if groups is None:
        groups = group_runs(starts, tables, [torch.ones(len(table), device=table.device) for table in tables])
    codes, shape = codes.contiguous(), (*codes.shape[:-1], len(scale))
    if scratch is None:
        out = torch.empty(shape, dtype=torch.float32, device=codes.device)
    else:
        out = scratch[: math.prod(shape)].view(shape)
    num_tokens, num_components = math.prod(shape[:-1]), shape[-1]
    if out.numel():
        blocks = triton.cdiv(num_components, TILE["BLOCK_COMPONENTS"]), triton.cdiv(num_tokens, TILE["BLOCK_TOKENS"])
        sizes = num_tokens, codes.shape[-1], num_components, len(groups.group_idx)
        pick_kernel[blocks](codes, *groups[:5], groups.group_idx, scale, out, *sizes, **TILE)
    return out
