"""`deltakv convert`: a learned compressor, as its authors publish it or ours, into a folder of ours."""

from __future__ import annotations

from pathlib import Path

from ..compressor.kv_compressor import KVCompressor
from ..errors import InvalidOptionError
from .console import console
from .folders import check_out


def run_convert(name: str, out: Path, latent_nbits: int | None, latent_group_size: int | None) -> None:
    """Loads, changes what is stored of a latent if asked to, writes, and says what came of it."""
    check_out(out)
    if latent_nbits is None and latent_group_size is not None:
        raise InvalidOptionError(
            f"`latent_group_size` must come with `latent_nbits`, got {latent_group_size} alone: it says how many "
            "numbers of a quantised latent share a scale."
        )
    compressor = KVCompressor.from_pretrained(name)
    if latent_nbits is not None:
        compressor = compressor.with_latents(latent_nbits, latent_group_size)
    compressor.config["share"] = compressor.share
    compressor.save_pretrained(out)
    console.print(
        f"{out}: {compressor.bytes_per_token():,.0f} bytes a compressed token, {compressor.config['share']:.1%} of a "
        f"16-bit cache; {compressor.nbytes / 2**20:,.1f} MiB to hold",
        markup=False,
        soft_wrap=True,
    )
