"""What every cache of this package does between forwards: crops, choices of rows, resets, copies, checks."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from . import host_layers
from .errors import CacheStateError, InvalidOptionError, NotPicklableError
from .hf_compat import Cache, DynamicCache, DynamicLayer
from .layer import DeltaKVLayer
from .layout import Step
from .selection import selection_stats
from .stats import CacheStats


class CompressedCache(Cache):
    """A cache whose own layers share a `TokenLedger`, beside layers of the host.

    A subclass sets, before its constructor ends: `_ledger`, `_registry` (RoPE tables), `_probes` (what is known of the
    model's layers), `_model` (weak reference, or None for a bare config), `model_config` and `_touched` (empty dict: a
    linear layer of the host can't tell which forwards have been through it).
    """

    @property
    def own_layers(self) -> list[DeltaKVLayer]:
        """The layers that compress; the others are the host's."""
        return [layer for layer in self.layers if isinstance(layer, DeltaKVLayer)]

    def _host_layers(self) -> list:
        return [layer for layer in self.layers if not isinstance(layer, DeltaKVLayer)]

    # -- forwards ------------------------------------------------------------------------------------------------

    def note_forward(
        self,
        module: nn.Module,
        attention_mask: object,
        input_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: torch.Tensor | None = None,
        is_text: bool = True,
    ) -> None:
        """Called by the hook on the model before a forward with this cache.

        Args:
            module: the model, or the text decoder inside it.
            attention_mask: `[batch, columns]`, 0 at padding; None and masks of other forms say nothing of padding.
            input_ids: `[batch, q]` int64 of this call, or None.
            use_cache: what the call says.
            position_ids: `[1 or batch, q]` int64 of this call, or None.
            is_text: the model is given nothing else that keys and values could depend on.

        Raises:
            CacheStateError: the last forward was broken off, or `use_cache=False` would feed the text twice.
        """
        if use_cache is False and input_ids is not None and 0 < self.get_seq_length() == input_ids.shape[-1] - 1:
            raise CacheStateError(
                "`use_cache` must not be False in `generate` with a cache, got False: every step would feed the whole "
                f"text on top of the {self.get_seq_length()} tokens held. Leave out one of the two."
            )
        if self._ledger.num_layers == 0:
            return
        outermost = self._model is not None and module is self._model()
        if self._ledger.begins(outermost, module):
            self._check_whole()
        self._ledger.note_mask(attention_mask, outermost, module)

    def _catch_up(self) -> None:
        """Waits, on the device, for what still runs of a forward that was broken off."""
        self._ledger.side.join()

    def _check_whole(self) -> None:
        """Raises unless every layer has been through the same forwards."""
        self._catch_up()
        self._ledger.check_whole()
        if self._ledger.num_layers == 0:
            return
        for layer_idx, layer in enumerate(self.layers):
            # a layer that stores nothing may share the keys of another
            if isinstance(layer, DynamicLayer) and (layer.is_initialized or layer_idx in self._probes):
                self._ledger.check_length(layer_idx, layer.get_seq_length())
        self._ledger.check_touched(self._touched)

    # -- what linear layers of the host ask in every forward, noted ------------------------------------------------

    def has_previous_state(self, layer_idx: int | None = None, *args, **kwargs) -> bool:
        """See `transformers.Cache.has_previous_state`."""
        self._touch(layer_idx)
        return super().has_previous_state(layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args, **kwargs) -> torch.Tensor | None:
        """See `transformers.Cache.get_conv_state`."""
        self._touch(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args, **kwargs) -> torch.Tensor | None:
        """See `transformers.Cache.get_recurrent_state`."""
        self._touch(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """See `transformers.Cache.update_conv_state`."""
        self._touch(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def _touch(self, layer_idx: int | None) -> None:
        if layer_idx is not None:
            self._touched[layer_idx] = self._ledger.serial

    # -- columns and rows ----------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest columns: `crop(-n)` removes n.

        Raw tokens go without a trace. Beyond them the compressed tokens that stay keep their codes. After a forward
        that was broken off, a crop to its beginning or further makes the cache whole again.

        Args:
            tokens_to_remove: 0 or minus the number of columns to remove; more than there are leaves none.

        Raises:
            InvalidOptionError: a positive number.
            CacheStateError: a broken forward would stay in part, or a layer of the host can't go back.
        """
        # transformers 5.17 counts rejected drafts in a tensor
        single = torch.is_tensor(tokens_to_remove) and tokens_to_remove.numel() == 1
        number = tokens_to_remove.item() if single else tokens_to_remove
        if not isinstance(number, int) or number > 0:
            raise InvalidOptionError(
                f"`tokens_to_remove` must be a whole number, 0 or negative, got {tokens_to_remove!r}: `crop(-n)` "
                "removes n tokens."
            )
        ledger = self._ledger
        ledger.check_untorn()
        self._catch_up()
        keep = max(0, self.get_seq_length() + number)
        broken = ledger.step
        if broken is not None and keep > broken.past:
            raise CacheStateError(
                f"`crop` must take back the forward that was broken off and leave at most {broken.past} columns, got "
                f"{keep}: crop by {keep - broken.past} more."
            )
        if keep == 0:
            self._forget(ledger.stats_of_empty())
            return
        if broken is not None:
            self._finish(broken)
        # the host's layers first: they may refuse
        host_layers.crop(self._host_layers(), self.get_seq_length(), keep)
        if keep >= ledger.columns and broken is None:
            return
        with ledger.changing("crop"):
            ledger.close()
            crop = ledger.crop(keep)
            for layer in self.own_layers:
                layer.crop_to(crop)
            for tables in self._registry.tables:
                tables.crop(keep)

    def _finish(self, broken: Step) -> None:
        """Makes all layers alike after a forward that was broken off; may be tried again if it fails."""
        if not any(layer.has_begun(broken) for layer in self.own_layers):
            self._ledger.undo()
            return
        for layer in self.own_layers:
            if layer.columns == broken.past:
                layer.complete(broken)

    def reset(self) -> None:
        """Forgets everything; options and model stay."""
        self._forget(CacheStats())

    def _forget(self, stats: CacheStats) -> None:
        self._ledger.side.join()
        # until the end, when the ledger is made anew
        self._ledger.torn = "reset"
        # the host's own layers are made anew: before transformers 5.18 their `reset` keeps the old length
        fresh = DynamicCache(config=self.model_config).layers
        for layer_idx, layer in enumerate(self.layers):
            if isinstance(layer, DeltaKVLayer):
                layer.reset()
                continue
            if getattr(layer, "record_past", False):
                fresh[layer_idx].activate_past_recording()
            host_layers.put(self.layers, layer_idx, fresh[layer_idx])
        self._touched.clear()
        self._registry.tables.clear()
        self._ledger.reset(stats)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` becomes the old row `beam_idx[i]` (beam search).

        Args:
            beam_idx: `[new batch]` int64.

        Raises:
            InvalidOptionError: there is no such row.
            CacheStateError: the last forward was broken off.
        """
        self._select("reorder_cache", beam_idx, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some rows.

        Args:
            indices: `[new batch]` int64, the rows in their new order, or `[batch]` bool.

        Raises:
            InvalidOptionError: there is no such row.
            CacheStateError: the last forward was broken off.
        """
        self._select("batch_select_indices", indices, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes several rows next to each other.

        Args:
            repeats: how many (>= 1).

        Raises:
            InvalidOptionError: less than one.
            CacheStateError: the last forward was broken off.
        """
        if repeats < 1:
            raise InvalidOptionError(f"`repeats` must be 1 or more, got {repeats}.")
        rows = torch.arange(self._ledger.batch_size).repeat_interleave(repeats)
        self._select("batch_repeat_interleave", repeats, rows)

    def _select(self, operation: str, argument: object, rows: torch.Tensor) -> None:
        """Does `operation(argument)` in the host's layers and what it means, the choice of `rows`, in ours."""
        ledger = self._ledger
        self._check_whole()
        ledger.settle()
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        # on a GPU the question would wait for the device, which asks it itself
        known = ledger.batch_size > 0 and rows.device.type == "cpu"
        if known and ((rows < 0) | (rows >= ledger.batch_size)).any():
            raise InvalidOptionError(
                f"rows for `{operation}` must be from 0 to {ledger.batch_size - 1}, got {rows.tolist()}."
            )
        # a layer of the host that lacks the operation says so before anything is changed
        change_host = [getattr(layer, operation) for layer in self._host_layers()]

        def change(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.index_select(0, rows.to(tensor.device))

        with ledger.changing(operation):
            for change_layer in change_host:
                change_layer(argument)
            if ledger.batch_size == 0:
                return
            # equal rows need no host copy of the indices, so beam search on an unpadded batch never waits
            ledger.select_rows(rows.tolist() if ledger.needs_rows else None, len(rows))
            for layer in self.own_layers:
                layer.select(change)
                if not any(ledger.compressed):
                    layer.drop_sinks()
            for tables in self._registry.tables:
                tables.map(change)

    # -- copies --------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict) -> CompressedCache:
        self._catch_up()
        new = memo[id(self)] = type(self).__new__(type(self))
        if self.offloading:
            memo[id(self.prefetch_stream)] = self.prefetch_stream
        vars(new).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return new

    def __reduce_ex__(self, protocol: int):
        raise NotPicklableError(
            f"a {type(self).__name__} can't be pickled or copied shallowly: it belongs to a model in this process. Use "
            "`copy.deepcopy(cache)` for a copy and `cache.save(path)` for a file."
        )

    @property
    def is_initialized(self) -> bool:
        """Whether every layer has its shapes; ours take them from the first tokens."""
        layers = [layer for layer in self.layers if isinstance(layer, DeltaKVLayer) or layer.supports_early_init]
        return len(layers) > 0 and all(layer.is_initialized for layer in layers)

    def stats(self) -> CacheStats:
        """What the cache has done so far.

        Returns:
            Counts since it was made or reset.
        """
        self._catch_up()
        return replace(self._ledger.stats, selection=selection_stats([layer.selector for layer in self.own_layers]))
