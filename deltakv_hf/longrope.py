"""Longrope models (Phi-3) let `generate` drop a cache where their frequencies change; here it is kept or an error.

The host does it in `prepare_inputs_for_generation` and says nothing: every later token then comes from a `DynamicCache`
of its own. It drops an empty cache as well, so a prompt beyond the switch would never reach ours. The model, not its
class, gets an attribute of that name that looks at what came out.
"""

from __future__ import annotations

from types import MethodType

from transformers import PreTrainedModel

from .errors import CacheStateError
from .support import longrope_switch


def guard(model: PreTrainedModel) -> None:
    """Lets a longrope model drop no cache of ours; other models are left as they are."""
    name = prepare_inputs_for_generation.__name__
    if hasattr(model, name) and longrope_switch(model.config.get_text_config(decoder=True)) is not None:
        vars(model)[name] = MethodType(prepare_inputs_for_generation, model)


def unguard(model: PreTrainedModel) -> None:
    """Undoes `guard`."""
    name = prepare_inputs_for_generation.__name__
    if getattr(vars(model).get(name), "__func__", None) is prepare_inputs_for_generation:
        del vars(model)[name]


def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs) -> dict:
    """The model's own, checked."""
    inputs = type(self).prepare_inputs_for_generation(self, input_ids, past_key_values=past_key_values, **kwargs)
    if not hasattr(past_key_values, "note_forward") or inputs.get("past_key_values") is past_key_values:
        return inputs
    held = past_key_values.get_seq_length()
    if held > 0:
        switch = longrope_switch(self.config.get_text_config(decoder=True))
        raise CacheStateError(
            f"`input_ids` must stay below {switch} tokens (`original_max_position_embeddings`) once a cache holds "
            f"some, got {input_ids.shape[1]} with {held} held: this longrope model changes its frequencies there and "
            "drops its cache. Feed the longer text as one prompt with a new cache."
        )
    # what was prepared is the whole prompt, as for any empty cache
    return inputs | {"past_key_values": past_key_values}
