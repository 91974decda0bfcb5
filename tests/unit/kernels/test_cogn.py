"""coGN's rounds by kernels against the blocks one by one, in double precision."""

import copy
from contextlib import nullcontext

import pytest
import torch

from castbench.models.batch import Batch, Sizes
from castbench.models.cogn import CoGN


def graph(degrees, n_padding, e_padding, seed=0):
    """A padded batch of one crystal whose nodes have these numbers of edges into them."""
    generator = torch.Generator().manual_seed(seed)
    nodes, edges = len(degrees), sum(degrees)
    starts = torch.tensor([0, *degrees, *[0] * n_padding]).cumsum(0)
    target = torch.repeat_interleave(torch.tensor(degrees))
    source = torch.randint(0, nodes, (edges,), generator=generator)
    order = source.argsort(stable=True)
    counts = torch.cat([source.bincount(minlength=nodes), torch.zeros(n_padding, dtype=torch.int64)])
    none = torch.full((e_padding,), nodes)
    m = torch.randint(1, 4, (edges,), generator=generator).float()
    return Batch(
        n=2,
        sizes=Sizes(1, nodes + n_padding, edges + e_padding),
        atomic_numbers=torch.randint(1, 90, (nodes + n_padding,), generator=generator),
        edge_source=torch.cat([source, none]),
        edge_target=torch.cat([target, none]),
        distances=8 * torch.rand(edges + e_padding, generator=generator),
        edge_multiplicities=torch.cat([m, torch.zeros(e_padding)]),
        edge_starts=starts,
        source_order=torch.cat([order, none]),
        source_starts=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
    )


def found(model, batch, weights, dtype=torch.float32):
    """Node states of the real nodes, and gradients of all parameters."""
    with torch.autocast(batch.distances.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        states = model.nodes(batch)[: len(weights)]
    loss = (states.double() * weights).sum()
    return [states, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize(
    ("degrees", "n_padding", "e_padding"),
    [([5, 0, 9, 1, 4], 3, 7), ([1] * 16 + [40], 4, 1), ([1], 1, 1), ([7, 0, 0, 65], 8, 60)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_blocks(
    device, monkeypatch, degrees, n_padding, e_padding, dtype
):
    torch.manual_seed(0)
    model = CoGN(width=32, depth=2)
    for parameter in model.parameters():  # no bias is zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = graph(degrees, n_padding, e_padding)
    exact = copy.deepcopy(model).double()
    exact_batch = copy.copy(batch)
    exact_batch.distances, exact_batch.edge_multiplicities = (
        batch.distances.double(), batch.edge_multiplicities.double(),
    )  # fmt: skip
    weights = torch.randn(len(degrees), 32, dtype=torch.float64)
    wanted = found(exact, exact_batch, weights)
    monkeypatch.setattr("castbench.kernels.usable", lambda *_: True)
    ours = found(model.to(device), batch.to(device), weights.to(device), dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    for name, one, other in zip(["states", *dict(model.named_parameters())], ours, wanted, strict=True):
        error = (one.cpu().double() - other).norm() / other.norm()
        assert error < tolerance, (name, error)


def test_kernels_that_are_wrong_are_not_used(device, monkeypatch, caplog):
    from castbench import kernels
    from castbench.kernels import cogn

    monkeypatch.setattr(torch.random, "fork_rng", lambda _: nullcontext())  # there may be no GPU
    off = [torch.ones(3)], [torch.ones(3) * 1.001], torch.float32
    monkeypatch.setattr(cogn, "check", lambda *_: kernels.compare(*off))
    assert not kernels.usable.__wrapped__("cogn", torch.device("cuda"), torch.float32)
    assert "cogn runs without its kernels, slower: RuntimeError: result 0 is off by 0.001" in caplog.text
    assert not kernels.usable("cogn", torch.device("cpu"), torch.float32)
