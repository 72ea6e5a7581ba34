"""Kernels that put spans of tokens together, and what was seen in other tokens."""

import torch
import triton
import triton.language as tl

from ..reference.attend import Attended
from .attend_kernels import LARGEST_WEIGHT, LOG2E, LOWEST

MERGE_VALUES = 64
ANY = "num_spans num_components num_heads num_queries num_blocks".split()


def before_of(before: Attended | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What kernels take of it."""
    return (None, None) if before is None else (before.output.contiguous(), before.log_total.contiguous())


def merge_spans(
    maxima: torch.Tensor,
    totals: torch.Tensor,
    mixed: torch.Tensor,
    before: Attended | None,
    output: torch.Tensor,
    log_total: torch.Tensor,
) -> None:
    """Fills in `output` and `log_total` of `Attended`.

    Args:
        maxima, totals, mixed: of spans, as `merge_kernel` takes them.
    """
    num_spans, value_dim = len(maxima), mixed.shape[-1]
    merge_kernel[(log_total.numel(), triton.cdiv(value_dim, MERGE_VALUES))](
        *(maxima, totals, mixed, *before_of(before), output, log_total, num_spans),
        HAS_BEFORE=before is not None,
        SPANS=triton.next_power_of_2(num_spans),
        VALUE_DIM=value_dim,
        BLOCK_VALUES=MERGE_VALUES,
    )


@triton.jit
def merge_before(output, log_total, row, column, is_column, before_output, before_log, VALUE_DIM: tl.constexpr):
    """With what the query of `row` saw before: output and the logarithm of the sum, as in `Attended.merge`."""
    other = tl.load(before_log + row)
    largest = tl.maximum(tl.maximum(log_total, other), LOWEST)
    own, others = tl.exp(log_total - largest), tl.exp(other - largest)
    total = own + others
    seen = tl.load(before_output + row * VALUE_DIM + column, mask=is_column, other=0.0).to(tl.float32)
    return (output * own + seen * others) / tl.maximum(total, 1.0), largest + tl.log(total)


@triton.jit
def log_of(maximum, total):
    """Of a sum relative to its largest term, which is a power of two: its natural logarithm."""
    return tl.where(total > 0, (maximum + tl.log2(tl.maximum(total, 1e-30))) / LOG2E, float("-inf"))


@triton.jit(do_not_specialize=ANY)
def merge_kernel(
    maxima,  # [spans, rows] float32, powers of two
    totals,  # [spans, rows] float32, times LARGEST_WEIGHT
    mixed,  # [spans, rows, VALUE_DIM] float32, times LARGEST_WEIGHT
    before_output,  # [rows, VALUE_DIM] floating
    before_log,  # [rows] float32
    output,  # [rows, VALUE_DIM] floating
    log_total,  # [rows] float32
    num_spans,
    HAS_BEFORE: tl.constexpr,
    SPANS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """Of every row, a query of a head, the spans and what was seen before."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    spans = tl.arange(0, SPANS)
    is_span, is_column = spans < num_spans, column < VALUE_DIM
    held = spans.to(tl.int64) * num_rows + row
    largest = tl.load(maxima + held, mask=is_span, other=LOWEST)
    most = tl.max(largest, 0)
    share = tl.exp2(largest - most) / LARGEST_WEIGHT
    total = tl.sum(tl.load(totals + held, mask=is_span, other=0.0) * share, 0)
    sums = mixed + held[:, None] * VALUE_DIM + column[None, :]
    sums = tl.load(sums, mask=is_span[:, None] & is_column[None, :], other=0.0)
    result, log = tl.sum(sums * share[:, None], 0) / tl.maximum(total, 1e-30), log_of(most, total)
    if HAS_BEFORE:
        result, log = merge_before(result, log, row, column, is_column, before_output, before_log, VALUE_DIM)
    tl.store(output + row * VALUE_DIM + column, result.to(output.dtype.element_ty), mask=is_column)
    if tl.program_id(1) == 0:
        tl.store(log_total + row, log)


@triton.jit(do_not_specialize=ANY)
def project_kernel(
    maxima,  # [blocks, spans, batch * heads * queries] float32, powers of two
    totals,  # [blocks, spans, batch * heads * queries] float32, times LARGEST_WEIGHT
    mixed,  # [spans, batch * heads * queries, components] float32, times LARGEST_WEIGHT
    value_map,  # [heads, components, VALUE_DIM]
    parts,  # [blocks, batch * heads * queries, VALUE_DIM] float32
    num_spans,
    num_components,
    num_heads,
    num_queries,
    SPANS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    BLOCK_COMPONENTS: tl.constexpr,
):
    """What a block of components, of all spans, adds to values of the queries of a head."""
    block, num_rows = tl.program_id(0), tl.num_programs(2) * num_queries
    blocks_of_values: tl.constexpr = (VALUE_DIM + BLOCK_VALUES - 1) // BLOCK_VALUES
    column = tl.program_id(1) % blocks_of_values * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    asked = tl.program_id(1) // blocks_of_values * ROWS + tl.arange(0, ROWS)
    rows, is_row, is_column = tl.program_id(2) * num_queries + asked, asked < num_queries, column < VALUE_DIM
    component = block * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
    is_component = component < num_components
    weights = (tl.program_id(2) % num_heads).to(tl.int64) * num_components + component
    weights = value_map + weights[:, None] * VALUE_DIM + column[None, :]
    weights = tl.load(weights, mask=is_component[:, None] & is_column[None, :], other=0.0)
    spans = tl.arange(0, SPANS)
    held = (block * num_spans + spans)[:, None] * num_rows + rows[None, :]
    is_held = (spans < num_spans)[:, None] & is_row[None, :]
    largest = tl.load(maxima + held, mask=is_held, other=LOWEST)
    share = tl.exp2(largest - tl.max(largest, 0)[None, :])
    total = tl.sum(tl.load(totals + held, mask=is_held, other=0.0) * share, 0)
    share = share / tl.maximum(total, 1e-30)[None, :]
    # means of components, which are at most 1
    means = tl.zeros([ROWS, BLOCK_COMPONENTS], tl.float32)
    for span in tl.static_range(SPANS):
        held = mixed + (span * num_rows + rows).to(tl.int64)[:, None] * num_components + component[None, :]
        is_held = is_row[:, None] & is_component[None, :] & (span < num_spans)
        own = tl.sum(tl.where(spans[:, None] == span, share, 0.0), 0)
        means += tl.load(held, mask=is_held, other=0.0) * own[:, None]
    result = tl.dot(means.to(weights.dtype), weights, input_precision="ieee")
    held = parts + (block * num_rows + rows)[:, None] * VALUE_DIM + column[None, :]
    tl.store(held, result, mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=ANY)
def finish_kernel(
    parts,  # as of project_kernel
    maxima,
    totals,
    value_scale,  # [heads, VALUE_DIM] float32
    value_mean,
    before_output,  # as of merge_kernel
    before_log,
    output,
    log_total,
    num_spans,
    num_heads,
    num_queries,
    num_blocks,
    HAS_BEFORE: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCKS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """Values of every row, and what was seen before."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    column, spans, blocks = tl.arange(0, BLOCK_VALUES), tl.arange(0, SPANS), tl.arange(0, BLOCKS)
    is_span, is_column = spans < num_spans, column < VALUE_DIM
    held = spans * num_rows + row
    largest = tl.load(maxima + held, mask=is_span, other=LOWEST)
    most = tl.max(largest, 0)
    share = tl.exp2(largest - most) / LARGEST_WEIGHT
    total = tl.sum(tl.load(totals + held, mask=is_span, other=0.0) * share, 0)
    result = parts + (blocks * num_rows + row)[:, None] * VALUE_DIM + column[None, :]
    result = tl.sum(tl.load(result, mask=(blocks < num_blocks)[:, None] & is_column[None, :], other=0.0), 0)
    of_head = row // num_queries % num_heads * VALUE_DIM + column
    result = result * tl.load(value_scale + of_head, mask=is_column, other=0.0)
    result += tl.load(value_mean + of_head, mask=is_column, other=0.0)
    # a query that sees nothing has no mean either
    result, log = tl.where(total > 0, result, 0.0), log_of(most, total)
    if HAS_BEFORE:
        result, log = merge_before(result, log, row, column, is_column, before_output, before_log, VALUE_DIM)
    tl.store(output + row * VALUE_DIM + column, result.to(output.dtype.element_ty), mask=is_column)
    tl.store(log_total + row, log)
