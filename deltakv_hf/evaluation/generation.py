"""Free generation: each cache writes its own continuation of the same prompts, and the full cache reads what came.

Teacher forcing never shows where a cache drifts to: the true tokens put it right again. Here a token written from what
was compressed is what the next one is written from. The full cache then says how likely it finds the text (`nll`),
beside how likely it finds its own (`full_nll`); a text that went wrong is one that it would not have written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from .fidelity import LOGIT_TILE, distance_bins

# repetition is counted in runs of so many tokens
RUN = 4


@dataclass(frozen=True)
class Continuation:
    """What a cache wrote behind one prompt.

    Attributes:
        ids: the tokens.
        nll: mean negative log likelihood of them under the full cache, nats.
        full_nll: the same of what the full cache itself wrote.
        agreement: tokens before the first that differs from the full cache's.
        repetition: share of runs of four tokens that stood in the continuation before.
        by_distance: `nll` and `full_nll` of the tokens `first` to `last` of the continuation.
    """

    ids: list[int]
    nll: float
    full_nll: float
    agreement: int
    repetition: float
    by_distance: list[dict]


@dataclass(frozen=True)
class Generation:
    """The continuations of all prompts; `mean` gives a figure's mean over them."""

    continuations: list[Continuation]

    def mean(self, name: str) -> float:
        """Mean of a field of `Continuation`."""
        return sum(getattr(one, name) for one in self.continuations) / len(self.continuations)

    def summary(self) -> dict:
        """Means by name and every continuation, for JSON."""
        names = ("nll", "full_nll", "agreement", "repetition")
        return {name: self.mean(name) for name in names} | {
            "prompts": len(self.continuations),
            "per_prompt": [asdict(one) for one in self.continuations],
        }


@torch.no_grad()
def write(model: PreTrainedModel, prompts: torch.Tensor, cache: Cache, num_tokens: int, seed: int | None = None):
    """Lets the model write behind `prompts` `[batch, context]`, compressing what it writes on its way.

    Args:
        num_tokens: of every continuation; an end of text is not written.
        seed: of the draws from the predictions; None takes the most likely token.

    Returns:
        `[batch, num_tokens]` int64.
    """
    prompts = prompts.to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed or 0)
        ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            past_key_values=cache,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=seed is not None,
            # the predictions as they are, whatever the model's own settings say
            temperature=1.0 if seed is not None else None,
            top_k=0 if seed is not None else None,
            top_p=1.0 if seed is not None else None,
            repetition_penalty=1.0,
            pad_token_id=0,
        )
    return ids[:, prompts.shape[1] :]


@torch.no_grad()
def nll_under_full_cache(model: PreTrainedModel, prompt: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood of each of the tokens `written` `[n]` behind `prompt`, float64 `[n]` on the CPU."""
    written = written.to(model.device)
    ids = torch.cat([prompt.to(model.device), written])[None]
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=len(written) + 1).logits[0, :-1]
    parts = zip(logits.split(LOGIT_TILE), written.split(LOGIT_TILE), strict=True)
    nll = [torch.nn.functional.cross_entropy(part.float(), true, reduction="none") for part, true in parts]
    return torch.cat(nll).double().cpu()


def agreement(ids: list[int], others: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((place for place, (a, b) in enumerate(zip(ids, others, strict=True)) if a != b), len(ids))


def repetition(ids: list[int]) -> float:
    """Share of the runs of `RUN` tokens that came before; 0 where there is no run."""
    runs = [tuple(ids[place : place + RUN]) for place in range(len(ids) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def judge_generation(
    model: PreTrainedModel, prompts: torch.Tensor, written: torch.Tensor, full: torch.Tensor
) -> Generation:
    """Lets the full cache read what a cache wrote, and what it wrote itself.

    Args:
        model: a causal language model.
        prompts: `[batch, context]` int64.
        written: what the cache wrote behind each of them, as `write` gives it, `[batch, num_tokens]`.
        full: what the full cache wrote with the same arguments.
    """
    return Generation([_judge(model, *row) for row in zip(prompts, written, full, strict=True)])


def _judge(model: PreTrainedModel, prompt: torch.Tensor, written: torch.Tensor, full: torch.Tensor) -> Continuation:
    own, best = (nll_under_full_cache(model, prompt, ids) for ids in (written, full))
    ids, full_ids = written.tolist(), full.tolist()
    bins = [
        {
            "first": first,
            "last": last,
            "nll": own[first - 1 : last].mean().item(),
            "full_nll": best[first - 1 : last].mean().item(),
        }
        for first, last in distance_bins(len(ids))
    ]
    return Continuation(ids, own.mean().item(), best.mean().item(), agreement(ids, full_ids), repetition(ids), bins)
