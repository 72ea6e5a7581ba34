"""How many bytes each layer gets: references, residuals, or tokens coded by themselves, at one price of a byte."""

from __future__ import annotations

from dataclasses import dataclass

from .allocation import Cut, cut, cut_to_budget, search_price
from .layer_fit import LayerFit

# bytes of a reference's number
ID_BYTES = 2
# bytes of a reference for each of an average token: they serve many, so their errors weigh more
REFERENCE_SHARE = 1.4


@dataclass(frozen=True)
class LayerPlan:
    """Bytes of one layer.

    Attributes:
        uses_references: else tokens are coded by themselves, as `cuts` say.
        cuts: by split, of residuals or of tokens.
        num_bytes: of an average token.
        loss: expected squared error of an average token, in KL for one token read by one prediction.
    """

    uses_references: bool
    cuts: list[Cut]
    num_bytes: float
    loss: float


def plan_references(layers: list[LayerFit], num_bytes: float) -> list[list[Cut]]:
    """Groups of references, by layer and split, if tokens have `num_bytes` on average in all layers together."""
    cuts = iter(cut_to_budget([table for layer in layers for table in layer.own_losses], REFERENCE_SHARE * num_bytes))
    return [[next(cuts) for _ in layer.own_losses] for layer in layers]


def plan_layers(layers: list[LayerFit], references: list[list[Cut]] | None, num_bytes: float) -> list[LayerPlan]:
    """The plan of every layer, so that an average token has at most `num_bytes` in all layers together.

    Args:
        references: what `plan_references` gave, for layers whose residuals were measured; None without references.
    """

    def solve(price: float) -> list[LayerPlan]:
        own = _plan_all(layers, [None] * len(layers), price)
        if references is None:
            return own
        pairs = zip(own, _plan_all(layers, references, price), strict=True)
        return [min(pair, key=lambda plan: plan.loss + price * plan.num_bytes) for pair in pairs]

    def size(plans: list[LayerPlan]) -> float:
        return sum(plan.num_bytes for plan in plans)

    plans = search_price(solve, size, num_bytes)
    if references is not None:
        # a layer that gives references up frees many bytes at once: with all of them decided, those are spent too
        decided = [cuts if plan.uses_references else None for cuts, plan in zip(references, plans, strict=True)]
        plans = search_price(lambda price: _plan_all(layers, decided, price), size, num_bytes)
    return plans


def _plan_all(layers: list[LayerFit], references: list[list[Cut] | None], price: float) -> list[LayerPlan]:
    """Plans at one price: against `references`, or of tokens coded by themselves where a layer has None."""
    pairs = list(zip(layers, references, strict=True))
    cuts = iter(cut([t for layer, own in pairs for t in (layer.residual_losses if own else layer.own_losses)], price))
    plans = []
    for layer, coded in pairs:
        own = [next(cuts) for _ in layer.own_losses]
        size, loss = sum(c.num_bytes for c in own), sum(c.loss for c in own)
        if coded:
            share = 1 / layer.stride
            size = (1 - share) * (size + ID_BYTES) + share * sum(c.num_bytes for c in coded)
            loss = (1 - share) * loss + share * sum(c.loss for c in coded)
        plans.append(LayerPlan(bool(coded), own, size, loss))
    return plans
