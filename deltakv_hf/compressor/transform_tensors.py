"""A layer's `Transform` as tensors of a compressor folder, and back.

Per layer: `mean` and `weights`, float32 `[width]`; `basis`, float16 `[splits, width / splits, width / splits]`, whose
rows are what components stand for in tokens less the mean and times the weights, so that encoding multiplies by its
inverse; `prediction`, float16 `[components]`; and for each run of a codebook `reference.N.table` and `reference.N.step`
(and `residual.N...`). A split holds the same share of the heads of K and of V; with one split, all heads are coded
jointly.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..dispatch import grid_limit
from .codebook import Codebook
from .layer_tensors import LayerTensors
from .transform import Transform


def transform_tensors(
    layer_idx: int,
    mean: torch.Tensor,
    weights: torch.Tensor,
    basis: torch.Tensor,
    prediction: torch.Tensor,
    codebooks: dict[str, Codebook],
) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors by name, and what `config.json` says of them."""
    name = f"layers.{layer_idx}"
    tensors = {
        f"{name}.mean": mean.float(),
        f"{name}.weights": weights.float(),
        f"{name}.basis": basis.half(),
        f"{name}.prediction": prediction.half(),
    }
    starts = {}
    for part, book in codebooks.items():
        starts[f"{part}_starts"] = book.starts
        for number, (table, step) in enumerate(zip(book.tables, book.steps, strict=True)):
            tensors[f"{name}.{part}.{number}.table"] = table
            tensors[f"{name}.{part}.{number}.step"] = step
    return {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, starts


def read_transform(tensors: dict[str, torch.Tensor], record: dict, layer_idx: int, source: str) -> Transform:
    """The transform of a layer.

    Args:
        record: the layer's entry in `config.json`: `widths` (of K and V), `reference_stride`, starts of runs.
        source: where it comes from, for messages.

    Raises:
        CompressorError: a tensor is missing, or shapes, dtypes and the record do not fit together.
    """
    reader = LayerTensors(tensors, f"layers.{layer_idx}", source)
    try:
        key_width, value_width = (int(n) for n in record["widths"])
        stride = int(record["reference_stride"])
        starts = {part: [int(n) for n in record[f"{part}_starts"]] for part in ("reference", "residual")}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise reader.wrong("widths, reference_stride and starts of runs", f"an entry without them ({error})") from error
    width = key_width + value_width
    mean, weights = (reader.take(name, torch.float32, (width,)) for name in ("mean", "weights"))
    basis = reader.take("basis", torch.float16, (None, None, None))
    splits = basis.shape[0]
    if splits == 0 or key_width % splits or value_width % splits or basis.shape[1:] != (width // splits,) * 2:
        raise reader.wrong(f"a basis that is square in its parts of {width} numbers", tuple(basis.shape))
    if stride < 1 or (stride == 1 and starts["residual"]) or (stride > 1 and not starts["reference"]):
        raise reader.wrong("a stride of at least 1, residuals only beyond, and references to predict from", stride)
    prediction = reader.take("prediction", torch.float16, (width,)).float()
    books = {part: _read_codebook(reader, part, starts[part], width) for part in starts}
    # a few more than are coded: kernels read rows that begin at whole words
    used = min(width, -(-max(book.end for book in books.values()) // 16) * 16)
    # of each part apart: one inverse of all would be the same, but not to the last bit
    inverse = spread(_inverse(basis.double()).transpose(1, 2), key_width).T.half()
    basis = spread(basis, key_width)
    if not all(part.isfinite().all() for part in (mean, weights, 1 / weights, inverse, basis, prediction)):
        raise reader.wrong("finite numbers and a basis that can be inverted", "others")
    books = {part: replace(book, num_components=used) for part, book in books.items()}
    return Transform(
        stride,
        mean,
        weights,
        # copies: a view would keep what is not used
        inverse[:, :used].clone(memory_format=torch.contiguous_format),
        basis[:used].clone(),
        prediction[:used].clone(),
        books["reference"],
        books["residual"],
    )


def spread(parts: torch.Tensor, key_width: int) -> torch.Tensor:
    """Rows of splits `[splits, rows, width / splits]` -> `[splits * rows, width]`, each in the columns of its heads."""
    splits, rows, size = parts.shape
    width, keys = splits * size, key_width // splits
    out = parts.new_zeros(splits * rows, width)
    for split, part in enumerate(parts):
        own = slice(split * rows, (split + 1) * rows)
        out[own, split * keys : (split + 1) * keys] = part[:, :keys]
        values = size - keys
        out[own, key_width + split * values : key_width + (split + 1) * values] = part[:, keys:]
    return out


def _read_codebook(reader, part: str, starts: list[int], width: int) -> Codebook:
    tables, steps, covered = [], [], 0
    for number, start in enumerate(starts):
        table = reader.take(f"{part}.{number}.table", (torch.int16, torch.int8), (None, 256, None))
        groups, _, size = table.shape
        step = reader.take(f"{part}.{number}.step", torch.float32, (groups,))
        end = start + groups * size
        if not covered <= start < end <= width:
            rule = f"runs that follow one another inside of {width} components, none of them empty"
            raise reader.wrong(rule, f"{groups} x {size} from {start}")
        if table.int().abs().max() > grid_limit(size):
            raise reader.wrong(
                f"integers up to {grid_limit(size)} in vectors of {size}", table.int().abs().max().item()
            )
        if not (step.isfinite() & (step > 0)).all():
            raise reader.wrong("steps that are finite and above 0", "others")
        tables.append(table)
        steps.append(step)
        covered = end
    return Codebook(starts, tables, steps, width)


def _inverse(basis: torch.Tensor) -> torch.Tensor:
    inverse, info = torch.linalg.inv_ex(basis)
    # what cannot be inverted shows as NaN, which the reader refuses
    return torch.where(info[:, None, None] == 0, inverse, torch.nan)
