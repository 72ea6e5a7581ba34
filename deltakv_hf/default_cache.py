"""`set_default_cache`: `model.generate(...)` without a cache argument makes its cache as the user says.

The host asks the model itself for the cache of a call (`_prepare_cache_for_generation`). The model, not its class, gets
an attribute of that name which shadows the class's method, and beside it the factory. Both are plain attributes of the
instance, so a deep copy of the model has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

from transformers import PreTrainedModel

from .attach import unwrap
from .errors import InvalidOptionError, UnsupportedModelError
from .hf_compat import Cache

FACTORY = "_default_cache_factory"


def set_default_cache(model: PreTrainedModel, factory: Callable[[PreTrainedModel], Cache] | None) -> None:
    """Makes `model.generate(...)` use `factory(model)`, a new cache for each call, where it is told of none.

    What a call asks for comes first: `past_key_values`, `use_cache=False` and `cache_implementation` (an argument or in
    the generation config) work as before. A second call replaces the factory.

    Args:
        model: a `transformers` model that generates (wrappers by PEFT or `torch.compile` are looked through).
        factory: function `(model) -> cache`, such as `DeltaKVCache` itself; None restores the host's default.

    Raises:
        InvalidOptionError: the model does not generate, or the factory is no function; in `generate`, the factory
            returns no cache or one that holds tokens.

    Examples:
        >>> set_default_cache(model, lambda model: DeltaKVCache(model, recent_window=64))
        >>> out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        >>> out.past_key_values
        DeltaKVCache(2 of 2 layers compressed, 513 tokens seen)
        >>> set_default_cache(model, None)
    """
    root = _root(model)
    if factory is not None and (not callable(factory) or isinstance(factory, Cache)):
        raise InvalidOptionError(
            f"`factory` must be a function that takes the model and returns a new cache, or None, got {factory!r}. "
            "Pass `DeltaKVCache` itself or `lambda model: DeltaKVCache(model, recent_window=64)`."
        )
    attributes = vars(root)
    if factory is None:
        attributes.pop(FACTORY, None)
        attributes.pop(_prepare_cache_for_generation.__name__, None)
    else:
        # not by setattr: a factory that is itself a module would become a part of the model
        attributes[FACTORY] = factory
        attributes[_prepare_cache_for_generation.__name__] = MethodType(_prepare_cache_for_generation, root)


def _root(model: object) -> PreTrainedModel:
    try:
        root = unwrap(model)
    except UnsupportedModelError:
        root = None
    if root is None or not root.can_generate():
        raise InvalidOptionError(
            f"`model` must be a transformers model with a `generate` method, got {type(root or model).__name__}. "
            "Load it with `AutoModelForCausalLM`."
        )
    return root


def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs):
    """Puts the factory's cache where the host looks for the user's, unless the call says otherwise."""
    chosen = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
    if not chosen and generation_config.use_cache is not False and self._supports_default_dynamic_cache():
        cache = vars(self)[FACTORY](self)
        if not isinstance(cache, Cache):
            raise InvalidOptionError(
                f"`factory` must return a transformers `Cache`, got {cache!r} from {vars(self)[FACTORY]!r}. "
                "Return the cache that it makes, or call `set_default_cache(model, None)`."
            )
        if cache.get_seq_length() > 0:
            raise InvalidOptionError(
                f"`factory` must make a new cache for each call, got one that holds {cache.get_seq_length()} tokens. "
                "Make the cache inside the factory; pass a cache with tokens as `past_key_values`."
            )
        if getattr(generation_config, "is_assistant", False):
            # drafts are taken back, so a host's layer that forgets (sliding, linear) must remember until then
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
    return type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
