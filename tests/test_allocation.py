"""How bytes are allotted to components, and the codebooks of 256 vectors that a byte chooses from."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltakv_hf.calibration import allocation
from deltakv_hf.calibration.allocation import SIZES, LossTable, cut, cut_to_budget, measure_losses
from deltakv_hf.calibration.basis import fit_basis
from deltakv_hf.calibration.plan import ID_BYTES, plan_layers, plan_references
from deltakv_hf.calibration.vectors import NUM_VECTORS, assign, fit_vectors, to_grid
from deltakv_hf.dispatch import grid_limit


def table(width, seed, decay=0.7, scale=1.0):
    """Random losses of components that get smaller."""
    rng = np.random.default_rng(seed)
    energies = scale * decay ** np.arange(width) * rng.uniform(0.2, 1.0, width)
    shares = {size: rng.uniform(0, 1, width - size + 1) * size / (size + 3) for size in SIZES if size <= width}
    return LossTable(np.concatenate([[0.0], energies.cumsum()]), shares)


tables = st.builds(
    table, st.integers(1, 40), st.integers(0, 999), st.sampled_from([0.5, 0.9, 1.0]), st.sampled_from([1e-12, 1.0, 1e6])
)


@pytest.mark.parametrize("num_bytes", [20, 60])
def test_a_plan_counts_references_and_what_they_lose(num_bytes):
    """A reference serves itself: an average token has its share of the bytes and of the loss of references."""
    stride = 4
    layers = [
        SimpleNamespace(own_losses=[table(40, seed)], residual_losses=[table(40, seed, scale=0.01)], stride=stride)
        for seed in (1, 2)
    ]
    references = plan_references(layers, num_bytes)
    plans = plan_layers(layers, references, num_bytes)
    assert all(plan.uses_references for plan in plans)
    for plan, coded in zip(plans, references, strict=True):
        (own,), (reference,) = plan.cuts, coded
        assert reference.loss > 0
        assert plan.loss == pytest.approx(0.75 * own.loss + 0.25 * reference.loss)
        assert plan.num_bytes == pytest.approx(0.75 * (own.num_bytes + ID_BYTES) + 0.25 * reference.num_bytes)
    assert sum(plan.num_bytes for plan in plans) <= num_bytes


def check_cut(row, found):
    """Groups lie side by side from the first component on, small ones first; the loss is what they say."""
    end, loss, before = 0, 0.0, 0
    for start, size in found.groups:
        assert start == end and size >= before
        loss += row.losses(size)[start]
        end, before = start + size, size
    assert end <= row.num_components
    assert found.loss == pytest.approx(loss + row.energy[-1] - row.energy[end], rel=1e-6, abs=1e-9 * row.energy[-1])
    runs = [(start + place * size, size) for start, size, count in found.runs() for place in range(count)]
    assert runs == found.groups and found.num_bytes == len(found.groups)


@given(st.lists(tables, min_size=1, max_size=4), st.integers(-40, 30))
def test_cuts_are_in_order_and_say_what_they_lose(rows, price):
    for row, found in zip(rows, cut(rows, 2.0**price), strict=True):
        check_cut(row, found)


@given(st.lists(tables, min_size=1, max_size=4), st.floats(0, 60))
def test_a_budget_is_kept_and_more_bytes_never_lose_more(rows, budget):
    cuts = cut_to_budget(rows, budget)
    more = cut_to_budget(rows, budget + 5)
    assert sum(c.num_bytes for c in cuts) <= budget
    total = sum(row.energy[-1] for row in rows)
    assert sum(c.loss for c in more) <= sum(c.loss for c in cuts) + 1e-9 * total
    assert sum(c.loss for c in cuts) <= total * (1 + 1e-9)


@given(st.integers(1, 8), st.integers(0, 10_000), st.integers(-12, 2))
def test_no_cut_is_better_at_the_same_price(width, seed, price):
    row, price = table(width, seed), 2.0**price
    (found,) = cut([row], price)
    best = np.inf
    for count in range(width + 1):
        for sizes in itertools.combinations_with_replacement([s for s in SIZES if s <= width], count):
            if sum(sizes) > width:
                continue
            starts = np.cumsum((0, *sizes[:-1])) if sizes else []
            loss = sum(row.losses(size)[start] for start, size in zip(starts, sizes, strict=True))
            best = min(best, loss + row.energy[-1] - row.energy[sum(sizes)] + price * count)
    assert found.loss + price * found.num_bytes == pytest.approx(best, rel=1e-9)


def test_rows_do_not_matter_to_each_other_at_a_price():
    rows = [table(width, seed) for seed, width in enumerate([5, 40, 5, 17])]
    assert cut(rows, 0.01) == [cut([row], 0.01)[0] for row in rows]


def test_nothing_is_stored_of_components_without_energy():
    rows = [LossTable(np.zeros(9), {size: np.ones(9 - size) for size in (1, 2, 4, 8)}), table(8, 0)]
    silent, other = cut_to_budget(rows, 4)
    assert silent.groups == [] and silent.loss == 0 and 0 < other.num_bytes <= 4


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(allocation, "SAMPLES", 400)
    monkeypatch.setattr(allocation, "PLACES", 3)
    monkeypatch.setattr(allocation, "ITERATIONS", 3)


@pytest.mark.parametrize("width", [1, 3, 7, 100])
def test_measured_losses(quick, width):
    generator = torch.Generator().manual_seed(0)
    components = torch.randn(700, width, generator=generator) * 0.8 ** torch.arange(width)
    measured = measure_losses(components, generator)
    assert measured.num_components == width
    assert list(measured.shares) == [size for size in SIZES if size <= width]
    torch.testing.assert_close(
        torch.tensor(measured.energy[1:]), components.double().square().mean(0).cumsum(0), check_dtype=False
    )
    for size, share in measured.shares.items():
        assert share.shape == (width - size + 1,) and (share > 0).all() and (share <= 1).all()
    # a byte is worth more for fewer components
    if width > 7:
        assert measured.shares[1][0] < measured.shares[4][0] < measured.shares[16][0]


@pytest.mark.parametrize("change", [lambda x: x * 0, lambda x: x * 1e-25, lambda x: x * 0 + 3.0])
def test_losses_of_components_that_never_change(quick, change):
    measured = measure_losses(
        change(torch.randn(600, 6, generator=torch.Generator().manual_seed(0))), torch.Generator()
    )
    assert np.isfinite(measured.energy).all()
    assert all(np.isfinite(share).all() for share in measured.shares.values())


def samples_of(kind, size):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(3, 600, size, generator=generator)
    if kind == "constant":
        return torch.full_like(x, -1.5)
    if kind == "zero":
        return x * 0
    if kind == "few":
        return x[:, :7].repeat(1, 90, 1)[:, :600]
    if kind == "duplicates":
        return x.round()
    if kind == "outlier":
        x[:, 0] = 1e4
    return x if kind != "tiny" else x * 1e-30


@pytest.mark.parametrize("size", [1, 2, 5, 16])
@pytest.mark.parametrize("kind", ["plain", "constant", "zero", "few", "duplicates", "outlier", "tiny"])
def test_vectors_are_finite_and_serve_their_samples(kind, size):
    x = samples_of(kind, size)
    vectors = fit_vectors(x, 4, torch.Generator().manual_seed(0))
    assert vectors.shape == (3, NUM_VECTORS, size) and vectors.isfinite().all()
    _, distance = assign(x, vectors)
    assert distance.isfinite().all()
    scale = x.abs().max()
    exact = torch.cdist(x.double(), vectors.double()).square().amin(-1)
    if kind in ("constant", "zero", "few"):
        assert exact.max() <= 1e-6 * scale**2
    else:
        assert exact.mean() < (x.double() - x.double().mean(1, keepdim=True)).square().sum(-1).mean()
    table, steps = to_grid(vectors)
    assert (steps > 0).all() and table.int().abs().max() <= grid_limit(size)
    torch.testing.assert_close(table * steps[:, None, None], vectors, rtol=0, atol=0.51 * steps.max().item())
    again, same = to_grid(table * steps[:, None, None])
    assert torch.equal(again, table)
    torch.testing.assert_close(same, steps)


@given(st.integers(1, 8), st.integers(0, 1000))
def test_vectors_are_better_than_drawn_ones(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 500, size, generator=generator)
    fitted = assign(x, fit_vectors(x, 6, generator))[1].mean()
    assert fitted <= assign(x, x[:, torch.randperm(500, generator=generator)[:256]])[1].mean() * 1.01


def test_assignment_finds_the_nearest_across_tiles(monkeypatch):
    monkeypatch.setattr("deltakv_hf.calibration.vectors.TOKEN_TILE", 7)
    generator = torch.Generator().manual_seed(0)
    x, vectors = (torch.randn(2, count, 3, generator=generator) for count in (30, 256))
    nearest, distance = assign(x, vectors)
    exact = torch.cdist(x.double(), vectors.double())
    assert torch.equal(nearest, exact.argmin(-1))
    torch.testing.assert_close(distance.double(), exact.amin(-1).square(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("silent", [None, "tokens", "sensitivity", "one number", "unused number"])
def test_a_basis_can_be_inverted_and_its_errors_are_what_they_cost(silent):
    generator = torch.Generator().manual_seed(0)
    size = 12
    tokens = torch.randn(400, size, generator=generator) @ torch.randn(size, size, generator=generator) + 3
    root = torch.randn(size, 4 * size, generator=generator, dtype=torch.float64)
    sensitivity = root @ root.T / size
    if silent == "tokens":
        tokens = tokens * 0 + 5
    elif silent == "sensitivity":
        sensitivity *= 0
    elif silent == "one number":
        tokens[:, 3] = 0.25
    elif silent == "unused number":
        sensitivity[3] = sensitivity[:, 3] = 0
    basis = fit_basis([tokens[:150], tokens[150:]], sensitivity)
    components = basis.analyse(tokens)
    assert components.isfinite().all() and basis.vectors.isfinite().all()
    back = components.double() @ basis.vectors / basis.weights + basis.mean
    torch.testing.assert_close(back, tokens.double(), rtol=1e-3, atol=1e-3)
    if silent is None:
        covariance = components.double().T @ components.double() / len(components)
        off = covariance - covariance.diagonal().diag()
        assert off.abs().max() < 2e-3 * covariance.max()
        assert (covariance.diagonal().diff() < 1e-3 * covariance.max()).all()
        # the metric: half of what is outside of the diagonal is believed
        metric = 0.5 * sensitivity + 0.5 * sensitivity.diagonal().diag()
        error = torch.randn(50, size, generator=generator, dtype=torch.float64)
        cost = (error @ metric * error).sum(-1)
        moved = (error * basis.weights @ torch.linalg.inv(basis.vectors)).square().sum(-1)
        torch.testing.assert_close(moved, cost, rtol=1e-2, atol=0)
