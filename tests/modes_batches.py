"""Modes with several rows in one cache."""

from __future__ import annotations

import torch
from case import BATCH, NEW, RAGGED, Case, Tensors, near, said
from families import row_of, text
from helpers import prompt


def padded(case: Case) -> Tensors:
    return said(case.generate(case.inputs(RAGGED)))


def order_of_rows_does_not_matter(case: Case, result: Tensors) -> None:
    reversed_rows = {name: torch.cat(tensor.chunk(3)[::-1]) for name, tensor in case.inputs(RAGGED).items()}
    near(case.forced(reversed_rows, result[0][:, -NEW:].flip(0)).flip(0), result[1])


def ragged(case: Case) -> Tensors:
    return (case.forced(case.inputs(RAGGED), prompt(len(RAGGED), NEW, seed=3)),)


def rows_are_as_if_alone(case: Case, result: Tensors) -> None:
    inputs, tokens = case.inputs(RAGGED), prompt(len(RAGGED), NEW, seed=3)
    for row in (0, 1):
        near(result[0][row], case.forced(row_of(inputs, row), tokens[row : row + 1])[0])


def widened_beams(case: Case) -> Tensors:
    cache, inputs = case.cache(), case.inputs()
    case.model(**inputs, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    ids = torch.cat([inputs["input_ids"], prompt(1, 5, seed=4)], dim=1)
    out = case.generate(text(inputs, ids), cache, num_beams=3, output_scores=True)
    return out.sequences, out.sequences_scores


def widened_beams_score_what_they_say(case: Case, result: Tensors) -> None:
    cache, inputs, tokens = case.cache(), case.inputs(), result[0][:, -NEW:]
    case.model(**inputs, past_key_values=cache)
    logits = case.forced(text(inputs, result[0][:, :-NEW]), tokens, cache).float().log_softmax(-1)
    scores = logits.gather(-1, tokens[..., None])[..., 0].mean(-1)
    assert (scores - result[1]).abs().max() < 0.05, f"beams say {result[1]}, their tokens {scores}"


def widened(case: Case) -> Tensors:
    """Four rows of questions about two prompts."""
    cache, inputs = case.cache(), case.inputs(prompts_of(case))
    repeats = 4 // len(inputs["input_ids"])
    case.model(**inputs, past_key_values=cache)
    cache.batch_repeat_interleave(repeats)
    wide = {name: inputs[name].repeat_interleave(repeats, dim=0) for name in ("input_ids", "attention_mask")}
    ids = torch.cat([wide["input_ids"], prompt(4, 5, seed=4)], dim=1)
    return (case.forced(text(wide, ids), prompt(4, NEW, seed=5), cache),)


def prompts_of(case: Case) -> list[int]:
    # a Qwen-VL model keeps the positions behind its images in itself, one number a row, and cannot widen them
    return BATCH if case.family.images is None else BATCH[:1]


def widened_rows_are_as_if_alone(case: Case, result: Tensors) -> None:
    prompts, tails, tokens = case.inputs(prompts_of(case)), prompt(4, 5, seed=4), prompt(4, NEW, seed=5)
    for row in (1, 2):
        cache, inputs = case.cache(), row_of(prompts, row * len(prompts["input_ids"]) // 4)
        case.model(**inputs, past_key_values=cache)
        ids = torch.cat([inputs["input_ids"], tails[row : row + 1]], dim=1)
        near(result[0][row], case.forced(text(inputs, ids), tokens[row : row + 1], cache)[0])
