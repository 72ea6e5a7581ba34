"""A layer's compressor as a module that gradients go through: what a cache would read back, of tokens as they are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from .. import dispatch
from ..calibration.vectors import to_grid
from ..compressor import LearnedCompressor, TransformCompressor, project
from ..references import Lattice


def straight_through(x: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """`stored` forwards, the gradient of `x` backwards."""
    return x + (stored - x).detach()


class TrainableLearned(nn.Module):
    """The learned compressor of the paper, `compressor/learned.py`, with parameters in float32.

    Args:
        coder: where training begins.
    """

    learning_rate = 6e-5

    def __init__(self, coder: LearnedCompressor):
        super().__init__()
        self.learned = learned = coder.learned
        networks = {"down": learned.down, "up": learned.up}
        self.kinds = {part: network.kind for part, network in networks.items()}
        self.weights = nn.ParameterDict()
        for part, network in networks.items():
            for name, weight in network.weights.items():
                # a parameter's name may not hold a dot
                self.weights[f"{part}/{name.replace('.', '/')}"] = nn.Parameter(weight.float().clone())

    def network(self, part: str, x: torch.Tensor) -> torch.Tensor:
        """Applies `f_down` ("down") or `f_up` ("up")."""
        prefix = f"{part}/"
        weights = {
            name.removeprefix(prefix).replace("/", "."): weight
            for name, weight in self.weights.items()
            if name.startswith(prefix)
        }
        return dispatch.feed_forward(x, weights, self.kinds[part])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `[batch, n, width]` float32 behind the sinks -> what a cache reads back, with its rounding."""
        span = self.learned.lattice.span(0, tokens.shape[1], tokens.device)
        kept, others = tokens.index_select(1, span.reference_offsets), tokens.index_select(1, span.residual_offsets)
        kept = straight_through(kept, kept.bfloat16().float())
        visible = span.num_visible.expand(tokens.shape[0], -1)
        with torch.no_grad():
            idx = dispatch.nearest_references(others, kept, visible, self.learned.top_k)
        predicted = mean_of(kept, idx)
        latents = self.network("down", others) - self.network("down", predicted)
        read = self.network("up", straight_through(latents, self._stored(latents.detach()))) + predicted
        order = torch.cat([span.reference_offsets, span.residual_offsets]).argsort()
        return torch.cat([kept, read], dim=1).index_select(1, order)

    def _stored(self, latents: torch.Tensor) -> torch.Tensor:
        nbits = self.learned.latent_nbits
        if nbits == 0:
            return latents.bfloat16().float()
        return dispatch.dequantize(*dispatch.quantize(latents, nbits, self.learned.latent_group_size), nbits)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The networks, by their names in a compressor folder."""
        return {name.replace("/", "."): weight.detach().cpu() for name, weight in self.weights.items()}


def mean_of(references: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """`dispatch.predict` that gradients go through: idx `[batch, n, top_k]` -> `[batch, n, width]`."""
    batch, num_references, width = references.shape
    first = torch.arange(batch, device=idx.device).view(-1, 1, 1) * num_references
    return pick(references.reshape(-1, width), idx + first).mean(dim=2)


def pick(table: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """Rows `[n, width]` of numbers `[..]` -> `[.., width]`; backwards a GPU adds them up, where an embedding sorts."""
    return table.index_select(0, idx.flatten()).view(*idx.shape, table.shape[-1])


class TrainableTransform(nn.Module):
    """A calibrated compressor, `compressor/transform.py`, whose vectors and mean move.

    Codes are those that the compressor would choose with its present vectors; gradients go to the vectors chosen and to
    the mean. Both move in units of the layer's coding error, so that one learning rate fits all layers and groups.

    Args:
        coder: where training begins.
    """

    learning_rate = 5e-2

    def __init__(self, coder: TransformCompressor):
        super().__init__()
        self.transform = transform = coder.transform
        # measured on the first tokens; 0 until then
        self.register_buffer("unit", torch.zeros((), device=transform.mean.device))
        self.books = {"reference": transform.reference_codebook, "residual": transform.residual_codebook}
        self.mean = nn.Parameter(torch.zeros_like(transform.mean))
        self.vectors = nn.ParameterDict()
        for part, book in self.books.items():
            for number, table in enumerate(book.tables):
                self.vectors[f"{part}/{number}"] = nn.Parameter(torch.zeros(table.shape, device=table.device))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `[batch, n, width]` float32 behind the sinks -> what a cache reads back."""
        if self.unit == 0:
            with torch.no_grad():
                components, read = (self.transform.analyse(x) for x in (tokens, self._read_back(tokens)))
                self.unit.copy_((read - components).square().mean().sqrt())
        return self._read_back(tokens)

    def _read_back(self, tokens: torch.Tensor) -> torch.Tensor:
        transform, mean = self.transform, self.present_mean()
        with torch.no_grad():
            components = replace(transform, mean=mean.detach()).analyse(tokens)
        if transform.reference_stride == 1:
            return project(self._read("reference", components), mean, transform.decoder())
        span = Lattice(transform.reference_stride).span(0, tokens.shape[1], tokens.device)
        references = self._read("reference", components.index_select(1, span.reference_offsets))
        others, visible = components.index_select(1, span.residual_offsets), span.num_visible.expand(len(tokens), -1)
        with torch.no_grad():
            idx = dispatch.nearest_references(others, references, visible, 1)
        predicted = mean_of(references, idx) * transform.prediction
        others = predicted + self._read("residual", others - predicted.detach())
        order = torch.cat([span.reference_offsets, span.residual_offsets]).argsort()
        read = torch.cat([references, others], dim=1).index_select(1, order)
        return project(read, mean, transform.decoder())

    def present_mean(self) -> torch.Tensor:
        """The mean as it is now; it moves a third as fast as the vectors."""
        return self.transform.mean + self.mean * (self.unit / 3) / self.transform.weights

    def _present(self, part: str) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Tables of integers and steps as they would be stored, and their vectors with gradients."""
        book, tables, steps, vectors = self.books[part], [], [], []
        # a run that has not moved is on its grid already; asked once, since the answer waits for the device
        has_moved = bool(self.unit)
        for number, (table, step) in enumerate(zip(book.tables, book.steps, strict=True)):
            moved = table.float() * step[:, None, None] + self.unit * self.vectors[f"{part}/{number}"]
            grid = to_grid(moved.detach()) if has_moved else (table, step)
            tables.append(grid[0])
            steps.append(grid[1])
            vectors.append(straight_through(moved, grid[0].float() * grid[1][:, None, None]))
        return tables, steps, vectors

    def _read(self, part: str, components: torch.Tensor) -> torch.Tensor:
        """Components as they are read back: the nearest vector of every group, 0 where nothing is stored."""
        starts = self.books[part].starts
        tables, steps, vectors = self._present(part)
        codes = dispatch.vector_quantize(components, starts, tables, steps).long()
        pieces, place, covered = [], 0, 0
        for start, table in zip(starts, vectors, strict=True):
            groups, _, size = table.shape
            rows = codes[..., place : place + groups] + torch.arange(0, 256 * groups, 256, device=codes.device)
            pieces += [
                components.new_zeros(*components.shape[:-1], start - covered),
                pick(table.view(-1, size), rows).flatten(-2),
            ]
            covered, place = start + groups * size, place + groups
        pieces.append(components.new_zeros(*components.shape[:-1], components.shape[-1] - covered))
        return torch.cat(pieces, dim=-1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What has moved, by its name in a compressor folder."""
        named = {"mean": self.present_mean()}
        for part in self.books:
            tables, steps, _ = self._present(part)
            for number, (table, step) in enumerate(zip(tables, steps, strict=True)):
                named |= {f"{part}.{number}.table": table, f"{part}.{number}.step": step}
        return {name: tensor.detach().cpu() for name, tensor in named.items()}
