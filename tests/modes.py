"""The modes of the compatibility matrix: what `generate` and users do with a cache, written once for every cache.

A mode runs on a `Case` and returns tensors, which a lossless cache shares with `DynamicCache`. Its check says what must
hold of any cache, compared with itself: a mode may not change what another mode says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from case import Case, Tensors
from families import Family, host_cache
from modes_batches import (
    order_of_rows_does_not_matter,
    padded,
    ragged,
    rows_are_as_if_alone,
    widened,
    widened_beams,
    widened_beams_score_what_they_say,
    widened_rows_are_as_if_alone,
)
from modes_calls import (
    custom_positions,
    holes_as_alone,
    packed,
    packed_as_the_host,
    positions_are_relative,
    right_padded,
    right_padded_as_alone,
    with_holes,
)
from modes_forms import (
    a_change_changes_nothing,
    a_dynamic_cache_reads_the_same,
    as_if_read_by_ours,
    compressed_later,
    continued,
    converted,
    dynamic_goes_on,
    gone_back,
    saved,
    steps_back_are_one,
)
from modes_generation import (
    as_greedy,
    assisted,
    beams,
    beams_score_what_they_say,
    by_default,
    default_is_ours,
    drafts_leave_no_trace,
    greedy,
    greedy_is_direct_calls,
    lookup,
    prefill,
    prefill_is_exact,
    sampling,
    sampling_reads_the_same,
    several,
    several_are_a_repeated_prompt,
    streamed,
    with_changes,
)
from modes_life import (
    a_copy_is_independent,
    chunked,
    chunked_is_direct_calls,
    copied,
    crop_leaves_no_trace,
    cropped,
    new_ids_are_full_ids,
    reset,
    turns,
    turns_hold_every_token,
    turns_with_new_ids,
)


@dataclass(frozen=True)
class Mode:
    """One column of the table.

    Attributes:
        name: of the mode; `group`: of the table that it stands in.
        run: what is compared with a `DynamicCache`.
        check: what must hold of any cache.
        host: what the host does instead, where its own cache is known to fail on a supported version.
    """

    name: str
    group: str
    run: Callable[[Case], Tensors]
    check: Callable[[Case, Tensors], None]
    host: Callable[[Case], Tensors] | None = None

    def expected(self, family: Family) -> Tensors:
        """What a `DynamicCache` says."""
        return (self.host or self.run)(Case(family, host_cache))


PLAIN, BATCHES, LIFE, CALLS, NUMBERS = (
    "Generation",
    "Batches",
    "A cache's life",
    "Direct calls",
    "Attention and numbers",
)
MODES = [
    Mode("prefill", PLAIN, prefill, prefill_is_exact),
    Mode("greedy", PLAIN, greedy, greedy_is_direct_calls),
    Mode("sampling", PLAIN, sampling, sampling_reads_the_same),
    Mode("several sequences", PLAIN, several, several_are_a_repeated_prompt),
    Mode("beam search", PLAIN, beams, beams_score_what_they_say),
    Mode("prompt lookup", PLAIN, lookup, drafts_leave_no_trace),
    Mode("assisted", PLAIN, assisted, drafts_leave_no_trace),
    Mode("streamer", PLAIN, streamed, as_greedy),
    Mode("default cache", PLAIN, by_default, default_is_ours),
    Mode("left padding", BATCHES, padded, order_of_rows_does_not_matter),
    Mode("ragged rows", BATCHES, ragged, rows_are_as_if_alone),
    Mode("widened for beams", BATCHES, widened_beams, widened_beams_score_what_they_say),
    Mode("widened for questions", BATCHES, widened, widened_rows_are_as_if_alone),
    Mode("chunked prefill", LIFE, chunked, chunked_is_direct_calls),
    Mode("turns, full ids", LIFE, turns, turns_hold_every_token),
    Mode("turns, new ids", LIFE, turns_with_new_ids, new_ids_are_full_ids),
    Mode("crop", LIFE, cropped, crop_leaves_no_trace),
    Mode("deep crop", LIFE, gone_back, steps_back_are_one),
    Mode("save and load", LIFE, saved, a_change_changes_nothing, host=continued),
    Mode("to `DynamicCache`", LIFE, converted, a_dynamic_cache_reads_the_same, host=continued),
    Mode("from `DynamicCache`", LIFE, compressed_later, as_if_read_by_ours, host=dynamic_goes_on),
    Mode("deepcopy", LIFE, copied, a_copy_is_independent),
    Mode("reset", LIFE, reset, as_greedy, host=greedy),
    Mode("right padding", CALLS, right_padded, right_padded_as_alone),
    Mode("holes in the mask", CALLS, with_holes, holes_as_alone),
    Mode("own position_ids", CALLS, custom_positions, positions_are_relative),
    Mode("packed sequences", CALLS, packed, packed_as_the_host),
    Mode("sdpa", NUMBERS, with_changes(attention="sdpa"), greedy_is_direct_calls),
    Mode("eager", NUMBERS, with_changes(attention="eager"), greedy_is_direct_calls),
    Mode("float16", NUMBERS, with_changes(dtype=torch.float16), greedy_is_direct_calls),
    Mode("bfloat16", NUMBERS, with_changes(dtype=torch.bfloat16), greedy_is_direct_calls),
]
