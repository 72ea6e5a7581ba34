"""Modes without `generate`: direct calls of the model, with masks and positions of their own."""

from __future__ import annotations

import torch
from case import Case, Tensors, errors, near
from families import PROMPT_LENGTH, host_cache
from helpers import prompt


def called(case: Case, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None, only=None) -> Tensors:
    """Logits of a prompt and of five single tokens behind it, all by `model(...)`.

    Args:
        mask: `[2, prompt]`, of the prompt; None makes a batch of one without a mask.
        positions: `[1, prompt]`; as the mask has them, unless given.
        only: the one row to run, without its padding.
    """
    batch = 1 if mask is None else len(mask)
    inputs, tails = case.inputs([PROMPT_LENGTH] * batch), prompt(batch, 5, seed=4)
    if mask is not None:
        inputs["attention_mask"] = torch.cat([mask, torch.ones_like(tails)], dim=1)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    else:
        del inputs["attention_mask"]
        positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, 6)], dim=1)
    ids = torch.cat([inputs.pop("input_ids"), tails], dim=1)
    if only is not None:
        real = inputs.pop("attention_mask")[only].bool()
        ids, positions = ids[only : only + 1, real], positions[only : only + 1, real]
        inputs = {k: v.chunk(batch)[only] for k, v in inputs.items()}
        inputs = {k: v[:, real[:PROMPT_LENGTH]] if v.shape[1] == PROMPT_LENGTH else v for k, v in inputs.items()}
    mask, cache = inputs.pop("attention_mask", None), case.cache()
    logits, past = [], ids.shape[1] - 5
    for start, stop in ((0, past), *((i, i + 1) for i in range(past, past + 5))):
        now = {} if mask is None else {"attention_mask": mask[:, :stop]}
        pictures = inputs if start == 0 else {}
        now |= {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
        logits.append(case.model(**now, **pictures, past_key_values=cache).logits)
    logits = torch.cat(logits, dim=1)
    # what stands at a pad means nothing
    return (logits if mask is None else logits.where(mask.bool()[..., None], 0),)


def holes(*places: slice) -> torch.Tensor:
    mask = torch.ones(2, PROMPT_LENGTH, dtype=torch.long)
    for row, place in enumerate(places):
        mask[row, place] = 0
    return mask


# the image, if any, stands at -10 .. -6
RIGHT, INSIDE = holes(slice(-3, None), slice(0, 0)), holes(slice(20, 29), slice(5, 8))


def right_padded(case: Case) -> Tensors:
    return called(case, RIGHT)


def right_padded_as_alone(case: Case, result: Tensors) -> None:
    rows_with_holes_are_as_if_alone(case, result, RIGHT)


def with_holes(case: Case) -> Tensors:
    return called(case, INSIDE)


def holes_as_alone(case: Case, result: Tensors) -> None:
    rows_with_holes_are_as_if_alone(case, result, INSIDE)


def rows_with_holes_are_as_if_alone(case: Case, result: Tensors, mask: torch.Tensor) -> None:
    if case.family.mixed:
        # windows and linear states of the host count padding, so its rows are not as if alone either
        prompt_is_exact(result, called(Case(case.family, host_cache), mask))
        return
    for row in range(2):
        near(result[0][row, -5:], called(case, mask, only=row)[0][0, -5:])


def custom_positions(case: Case) -> Tensors:
    return called(case, positions=torch.arange(50, 50 + PROMPT_LENGTH)[None])


def positions_are_relative(case: Case, result: Tensors) -> None:
    """What is rotated knows distances alone."""
    if case.family.relative:
        near(*result, *called(case, positions=torch.arange(PROMPT_LENGTH)[None]))
    else:
        prompt_is_exact(result, custom_positions(Case(case.family, host_cache)))


def packed(case: Case) -> Tensors:
    half = torch.arange(PROMPT_LENGTH // 2)
    return called(case, positions=torch.cat([half, half])[None])


def packed_as_the_host(case: Case, result: Tensors) -> None:
    """The host takes no notice of restarting positions once there is a cache, and so do we."""
    prompt_is_exact(result, packed(Case(case.family, host_cache)))


def prompt_is_exact(result: Tensors, expected: Tensors) -> None:
    assert torch.equal(result[0][:, :PROMPT_LENGTH], expected[0][:, :PROMPT_LENGTH])
    assert errors(result[0], expected[0])[:, PROMPT_LENGTH:].median() < 1, "not even near the full cache"
