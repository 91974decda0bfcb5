import torch
from torch.nn import functional

from castbench.models.batch import Batch
from castbench.models.cogn import CoGN
from castbench.models.structure import StructureOnly
from model_batches import join


def test_reference_settings_have_697601_parameters():
    model = StructureOnly({"cogn": {"width": 128, "depth": 5}})
    assert sum(p.numel() for p in model.parameters()) == 697_601
    assert all(p.requires_grad for p in model.parameters())


def test_starts_as_keras_does():
    torch.manual_seed(0)
    model = CoGN(width=128, depth=1)
    assert 0.049 < model.node_input.embedding.weight.abs().max() <= 0.05
    first = model.blocks[0].first
    limit = (6 / (384 + 128)) ** 0.5
    assert 0.99 * limit < first.weight.abs().max() <= limit
    assert not first.bias.any() and not model.edge_input.bias.any()


def plain_cogn(model, batch):
    """coGN as published: every parallel edge by itself, messages from the concatenation, sums in a loop."""
    count = batch.edge_multiplicities.long()
    source, target = (x.repeat_interleave(count) for x in (batch.edge_source, batch.edge_target))
    distances = batch.distances.repeat_interleave(count)
    centres = 0.25 * torch.arange(1, 33)
    edges = model.edge_input(torch.exp(-((distances[:, None] - centres) ** 2) / (2 * 0.5**2)))
    rows = batch.atomic_numbers - 1
    element = model.node_input
    h = element.linear(torch.cat([element.embedding(rows), element.facts[rows]], dim=1))
    for block in model.blocks:
        message = torch.cat([edges, h[target], h[source]], dim=1)
        for layer in (block.first, *block.hidden):
            message = functional.silu(layer(message))
        total = torch.zeros_like(h)
        for edge, node in enumerate(target.tolist()):
            total[node] = total[node] + message[edge]
        h = h + functional.silu(block.update(total))
    return h


def test_equals_the_published_form(crystals):
    torch.manual_seed(1)
    model = CoGN(width=16, depth=3)
    batch = join(crystals())
    torch.testing.assert_close(model.nodes(batch), plain_cogn(model, batch), atol=1e-5, rtol=1e-5)


def test_asymmetric_unit_equals_the_full_cell():
    """A chain A-B with two equivalent B: merged into one node of multiplicity 2, or all three spelled out."""
    model = StructureOnly({"cogn": {"width": 16, "depth": 3}})
    unit = Batch(
        n=1,
        atomic_numbers=torch.tensor([8, 22]),
        multiplicities=torch.tensor([1.0, 2.0]),
        node_offsets=torch.tensor([0, 2]),
        edge_source=torch.tensor([1, 0, 1]),
        edge_target=torch.tensor([0, 1, 1]),
        distances=torch.tensor([2.0, 2.0, 3.1]),
        edge_multiplicities=torch.tensor([2.0, 1.0, 1.0]),
    )
    cell = Batch(
        n=1,
        atomic_numbers=torch.tensor([8, 22, 22]),
        multiplicities=torch.ones(3),
        node_offsets=torch.tensor([0, 3]),
        edge_source=torch.tensor([1, 2, 0, 0, 2, 1]),
        edge_target=torch.tensor([0, 0, 1, 2, 1, 2]),
        distances=torch.tensor([2.0, 2.0, 2.0, 2.0, 3.1, 3.1]),
        edge_multiplicities=torch.ones(6),
    )
    torch.testing.assert_close(model(unit), model(cell), atol=1e-5, rtol=1e-5)


def test_hidden_nodes_show_nothing_of_their_element(crystals):
    model = CoGN(width=16, depth=2)
    batch, hidden = join(crystals()), torch.randn(16)
    batch.masked_nodes = torch.ones_like(batch.masked_nodes)
    before = model.nodes(batch, hidden)
    batch.atomic_numbers = batch.atomic_numbers.flip(0)
    assert torch.equal(model.nodes(batch, hidden), before)
    assert not torch.allclose(model.nodes(batch), before)


def test_only_the_masked_nodes_are_hidden(crystals):
    model = CoGN(width=16, depth=2)
    batch, hidden = join(crystals()), torch.randn(16)
    before = model.nodes(batch, hidden)
    batch.atomic_numbers = torch.where(batch.masked_nodes, 7, batch.atomic_numbers)
    assert torch.equal(model.nodes(batch, hidden), before)
    batch.atomic_numbers = torch.where(batch.masked_nodes, batch.atomic_numbers, 7)
    assert not torch.allclose(model.nodes(batch, hidden), before)
