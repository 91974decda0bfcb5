import pytest
import torch
from torch.nn import functional

from castbench.models import messages
from castbench.models.messages import Messages

NODES, EDGES, WIDTH, BASIS, LAYERS = 7, 23, 5, 4, 3


@pytest.fixture
def inputs():
    """Inputs of `Messages.apply`, float64; node 3 receives nothing."""
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    constants = (
        torch.rand(EDGES, BASIS, dtype=torch.float64),
        torch.randint(1, 4, (EDGES,)).double(),
        torch.randint(0, NODES, (EDGES,)),
        torch.tensor([0, 1, 2, 4, 5, 6])[torch.randint(0, 6, (EDGES,))],
    )
    nodes = normal(NODES, WIDTH), normal(NODES, WIDTH)
    return (
        *constants,
        *nodes,
        normal(WIDTH, BASIS),
        normal(WIDTH),
        normal(LAYERS, WIDTH, WIDTH),
        normal(LAYERS, WIDTH),
    )


def plain(edges, m, source, target, receiver, sender, weight, bias, weights, biases):
    """The same by autograd."""
    x = functional.silu(functional.linear(edges, weight, bias) + receiver[target] + sender[source])
    for matrix, shift in zip(weights, biases, strict=True):
        x = functional.silu(functional.linear(x, matrix, shift))
    return torch.zeros_like(receiver).index_add(0, target, x * m[:, None])


@pytest.mark.parametrize("size", [1, 8, EDGES, 1000])
def test_sums_and_gradients_are_those_of_autograd(inputs, monkeypatch, size):
    monkeypatch.setattr(messages, "EDGES", size)
    ours, theirs = Messages.apply(*inputs), plain(*inputs)
    assert (ours[3] == 0).all() and ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), inputs[4:]),
        torch.autograd.grad((theirs * weights).sum(), inputs[4:]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_no_edges_give_no_messages(inputs):
    few = [value[:0] for value in inputs[:4]] + list(inputs[4:])
    assert not Messages.apply(*few).any()
    Messages.apply(*few).sum().backward()
    assert not inputs[4].grad.any()


def test_products_in_bfloat16_are_summed_in_float32(inputs):
    single = [value.float() if value.is_floating_point() else value for value in inputs]
    half = [single[0].bfloat16(), *single[1:4], *(value.bfloat16() for value in single[4:])]
    found, expected = Messages.apply(*half), plain(*single)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_gradients_in_bfloat16_do_not_depend_on_the_number_of_pieces(monkeypatch):
    """The pieces' sums are added in float32."""
    torch.manual_seed(0)
    n, width = 2000, 8
    ends = torch.randint(0, 50, (2, n)).sort().values
    nodes, layers = torch.randn(2, 50, width).bfloat16(), torch.randn(3, width, width).bfloat16()
    found = []
    for size in (n, 4):
        monkeypatch.setattr(messages, "EDGES", size)
        own = [
            part.clone().requires_grad_()
            for part in (*nodes, layers[0], layers[0, 0], layers[1:], layers[1:, 0])
        ]
        graph = torch.ones(n, width).bfloat16(), torch.ones(n), *ends
        Messages.apply(*graph, *own).sum().backward()
        found.append([part.grad.float() for part in own])
    for whole, pieces in zip(*found, strict=True):
        assert (whole - pieces).norm() < 5e-3 * whole.norm()
