"""`KVCompressor`: what was calibrated for one model, as it is saved, shared and given to a cache."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..config import check_integer
from ..errors import CompressorError, InvalidOptionError
from ..hub import push_folder, resolve_folder
from .base_model import check_model
from .card import model_card
from .coder import Coder
from .folder import read_folder, write_folder
from .learned import LearnedCompressor
from .learned_tensors import read_learned
from .published import is_published, read_published
from .transform import TransformCompressor
from .transform_tensors import read_transform

# how each kind reads a layer of a folder, and what codes with it
KINDS = {"transform": (read_transform, TransformCompressor), "learned": (read_learned, LearnedCompressor)}
OWN_KINDS = tuple(KINDS)


class KVCompressor:
    """A compressor of keys and values, made for one model.

    `DeltaKVCache(model, compressor=compressor)` uses it. Make one with `KVCompressor.calibrate`, or take one that
    somebody made with `KVCompressor.from_pretrained`. Kind "transform" is calibrated; kind "learned" is the form of
    DeltaKV (arXiv 2602.08005, section 3.2).

    Args:
        config: as in `config.json`: `kind`, `layers` (a dict or None each), and what its maker notes.
        tensors: CPU tensors by name, `layers.{layer_idx}.{part}`.
        name: where it came from, for messages.

    Attributes:
        report: figures of a compressor that was calibrated in this process, else None.

    Raises:
        CompressorError: the kind is unknown, or tensors are missing or of the wrong shape or dtype.

    Examples:
        >>> compressor = KVCompressor.from_pretrained("smollm2-135m-instruct-10x")
        >>> compressor
        KVCompressor('smollm2-135m-instruct-10x' for HuggingFaceTB/SmolLM2-135M-Instruct, 2304 bytes a token)
        >>> round(compressor.share, 3)  # of the bytes of a token in 16 bits
        0.1
        >>> DeltaKVCache(model, compressor=compressor)
        Traceback (most recent call last):
        ...
        deltakv_hf.errors.CompressorError: ...
    """

    report = None

    def __init__(self, config: dict, tensors: dict[str, torch.Tensor], name: str = "a new compressor"):
        self.config, self.tensors, self.name = config, tensors, name
        if config.get("kind") not in KINDS or not isinstance(config.get("layers"), list):
            raise CompressorError(
                f"`config` must be of kind {' or '.join(KINDS)} and list its layers, got kind {config.get('kind')!r} "
                f"in {name}: use the version of deltakv-hf that wrote it, or run the code that registers it first "
                "(`KVCompressor.register`)."
            )
        read, self._coder = KINDS[config["kind"]]
        self._parts: list = [
            None if layer is None else read(tensors, layer, layer_idx, name)
            for layer_idx, layer in enumerate(config["layers"])
        ]
        self._placed: dict[tuple[int, torch.device], Coder] = {}

    # -- making, saving, loading ----------------------------------------------------------------------------------

    @staticmethod
    def register(kind: str, read: Callable, coder: Callable[..., Coder]) -> None:
        """Makes compressors of a kind of your own known, to be used, saved and loaded like those of the package.

        `KVCompressor(config, tensors)` makes one. Its `config` says `kind`, `model` (by `describe_model`) and `layers`:
        for each layer None, or a dict with `widths`, the numbers of a token in K and in V, and what else `read` wants.

        Args:
            kind: what `config["kind"]` says. One that is registered again is replaced.
            read: function `(tensors, layer, layer_idx, name)` of a layer's entry in `config["layers"]`. It gives what
                `coder` needs, anything with a method `.to(device)`: a tensor, for instance.
            coder: function of what `read` gave on the layer's device; it gives a `Coder` (a `TokenCoder`, say).

        Raises:
            InvalidOptionError: the kind is one of the package's.
        """
        if kind in OWN_KINDS:
            raise InvalidOptionError(
                f"`kind` must be a name of your own, got {kind!r}, which is one of the package's "
                f"({', '.join(OWN_KINDS)}): choose another."
            )
        KINDS[kind] = read, coder

    @classmethod
    def calibrate(cls, model: PreTrainedModel, texts, **options) -> KVCompressor:
        """Fits a compressor to a model; see `deltakv_hf.calibration.calibrate`.

        Args:
            model: on the device where calibration shall run.
            texts: documents, several sources as a dict by name, or ids `[n, window]` int64.
            **options: those of `calibrate`, such as `ratio=10`.

        Returns:
            The compressor, with a `report`.

        Raises:
            InvalidOptionError: an option is out of range, or there is too little text.
            CompressorError: the model gives numbers that are not finite.
            UnsupportedModelError: the model's attention cannot be served.

        Examples:
            >>> compressor = KVCompressor.calibrate(model, texts, ratio=8, reference_stride=1, measured_windows=0)
            >>> compressor.share <= 1 / 8
            True
            >>> DeltaKVCache(model, compressor=compressor)
            DeltaKVCache(2 of 2 layers compressed, 0 tokens seen)
        """
        from ..calibration import calibrate

        return calibrate(model, texts, **options)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> KVCompressor:
        """Loads a compressor from a folder, from this package by its bare name, or from the Hub by `owner/name`.

        The copy in the local cache is also taken if the Hub does not answer.

        Args:
            id_or_path: path of a folder; else a name without "/", of one that comes with the package; else an id on
                the Hub.
            revision: branch, tag or commit on the Hub (None: main).
            token: for the Hub (None: the one that was logged in with).
            cache_dir: where downloads are kept (None: the cache that all of `huggingface_hub` uses).
            local_files_only: take what was downloaded before and ask nobody, as `HF_HUB_OFFLINE=1` does.
            force_download: download again what is there already.

        Returns:
            The compressor, its tensors on the CPU.

        Raises:
            CompressorError: there is none, it cannot be downloaded, or it is damaged; the message says what to do.
        """
        folder = resolve_folder(
            id_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        if is_published(folder):
            return cls(*read_published(folder, str(id_or_path)), name=str(id_or_path))
        return cls(*read_folder(folder), name=str(id_or_path))

    def with_latents(self, nbits: int, group_size: int | None = None) -> KVCompressor:
        """A learned compressor whose latents are stored in `nbits` bits; its networks are the same.

        Args:
            nbits: 2, 4 or 8; 0 stores bfloat16, as most published compressors do.
            group_size: numbers that share a scale and a minimum (None: 32, or all of a narrower latent).

        Returns:
            Another compressor, which shares the tensors.

        Raises:
            InvalidOptionError: it is not a learned compressor, or the sizes do not divide its latents.
        """
        if self.config["kind"] != "learned":
            raise InvalidOptionError(
                f"`nbits` can be chosen for a learned compressor, and {self.name} is of kind {self.config['kind']!r}: "
                "calibrate it again for another ratio."
            )
        check_integer("nbits", nbits, low=0, high=8)
        width = next(part.down.out_width for part in self._parts if part is not None)
        group_size = min(32, width) if group_size is None else group_size
        check_integer("group_size", group_size, low=1, high=width)
        if nbits not in (0, 2, 4, 8) or width % group_size or width * nbits % 8:
            raise InvalidOptionError(
                f"`nbits` must be 0, 2, 4 or 8, and `group_size` divide the {width} numbers of a latent, got "
                f"nbits={nbits} and group_size={group_size}."
            )
        change = {"latent_nbits": nbits, "latent_group_size": group_size}
        layers = [layer if layer is None else layer | change for layer in self.config["layers"]]
        return KVCompressor(self.config | {"layers": layers}, self.tensors, self.name)

    def save_pretrained(self, path: str | os.PathLike, extra: dict[str, bytes] | None = None) -> None:
        """Writes the compressor's folder with a model card, whole or not at all.

        Args:
            path: a new folder, or one of a compressor, which is replaced.
            extra: further files by name (pictures, a report).

        Raises:
            CompressorError: `path` is something else than a compressor's folder, or cannot be written.
        """
        files = {"README.md": model_card(self.config).encode()} | (extra or {})
        write_folder(path, self.config, self.tensors, files)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        extra: dict[str, bytes] | None = None,
    ) -> str:
        """Uploads the compressor with its model card to the Hub, in one commit.

        Args:
            repo_id: "owner/name"; the repository is made if there is none.
            private: whether a new repository is private (None: what the owner's settings say).
            token: for the Hub (None: the one that was logged in with).
            revision: an existing branch to commit to (None: main).
            commit_message: its first line (None: "Upload the compressor").
            create_pr: open a pull request instead of committing.
            extra: further files by name.

        Returns:
            The URL of the commit or of the pull request.

        Raises:
            CompressorError: the Hub refuses; the message says what to do.
        """
        files = {"README.md": model_card(self.config, repo_id).encode()} | (extra or {})
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "compressor"
            write_folder(folder, self.config, self.tensors, files)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    # -- what a cache asks ----------------------------------------------------------------------------------------

    @property
    def reference_stride(self) -> int:
        """Largest stride of a layer: the one of the layers where references pay, 1 if there is none."""
        return max((coder.lattice.stride for coder in self._coders), default=1)

    @property
    def reference_growth(self) -> float:
        """Growth of the stride, 0 where it is fixed."""
        return max((coder.lattice.growth for coder in self._coders), default=0.0)

    @property
    def _coders(self) -> list[Coder]:
        return [self._coder(part) for part in self._parts if part is not None]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides what a code means."""
        digest = hashlib.sha256(json.dumps(self.config["layers"], sort_keys=True).encode())
        for name, tensor in sorted(self._coding_tensors.items()):
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def _coding_tensors(self) -> dict[str, torch.Tensor]:
        """All but statistics, which are kept for other compressors."""
        return {name: tensor for name, tensor in self.tensors.items() if ".statistics." not in name}

    @property
    def nbytes(self) -> int:
        """Bytes held to code with it, shared by all caches on one device."""
        return sum(tensor.nbytes for coder in self._coders for tensor in coder.tensors())

    def bytes_per_token(self) -> float:
        """Adds up what a token takes.

        Returns:
            Stored bytes of a compressed token, all layers together, references in their share.
        """
        return sum(coder.bytes_per_token() for coder in self._coders)

    @property
    def share(self) -> float:
        """Bytes of a compressed token over those of the same token in a 16-bit cache."""
        dense = sum(2 * sum(layer["widths"]) for layer in self.config["layers"] if layer is not None)
        return self.bytes_per_token() / dense

    def check_model(self, model: PreTrainedModel | PretrainedConfig) -> None:
        """Checks that it was made for a model; warns if that is another one of the same architecture.

        Args:
            model: the model, or its config.

        Raises:
            CompressorError: the architecture is another one.
        """
        check_model(self.config.get("model"), model)

    def layer(self, layer_idx: int, key_width: int, value_width: int, device: torch.device) -> Coder:
        """The compressor of one layer on one device, made once.

        Args:
            layer_idx: number of the layer.
            key_width: numbers of a token in K, `num_key_value_heads * head_dim`.
            value_width: the same of V.
            device: where it shall code.

        Returns:
            What codes the layer's tokens; all caches share it.

        Raises:
            CompressorError: it has nothing for this layer, or other widths.
        """
        part = self._parts[layer_idx] if layer_idx < len(self._parts) else None
        if part is None or [key_width, value_width] != self.config["layers"][layer_idx]["widths"]:
            made = "nothing" if part is None else f"widths {self.config['layers'][layer_idx]['widths']}"
            raise CompressorError(
                f"`compressor` must fit keys and values of layer {layer_idx}, {key_width} and {value_width} numbers a "
                f"token, but {self.name} has {made} for it. Take a compressor that was made for this model."
            )
        place = layer_idx, device
        if place not in self._placed:
            self._placed[place] = self._coder(part.to(device))
        return self._placed[place]

    def __deepcopy__(self, memo: dict) -> KVCompressor:
        # nothing of it ever changes: copies of a cache share it
        return self

    def __repr__(self) -> str:
        model = (self.config.get("model") or {}).get("id")
        return f"KVCompressor({self.name!r} for {model}, {self.bytes_per_token():.0f} bytes a token)"
