"""ALIGNN, CGCNN and MEGNet written out as published, on the whole cell with every bond by itself.

Statistics of batch normalisation are those of the rows, angles come from the bonds' own directions, and no
multiplicity is used: nothing of what the encoders do to work on the asymmetric unit.
"""

import pytest
import torch
from torch.nn import functional

from castbench.models.structure import StructureOnly
from crystals import prototypes, varied_crystals
from model_batches import SMALL_ENCODERS, cell_batch, graph_batch


def normalised(norm, x):
    deviation = (x - x.mean(0)) / (x.var(0, unbiased=False) + norm.eps).sqrt()
    return deviation * norm.weight + norm.bias


def summed(values, at, n):
    return torch.zeros(n, values.shape[1], dtype=values.dtype).index_add(0, at, values)


def bonds_of(batch):
    """Source, target and length of every bond, parallel ones spelled out."""
    count = batch.edge_multiplicities.long()
    return [x.repeat_interleave(count) for x in (batch.edge_source, batch.edge_target, batch.distances)]


def alignn(encoder, batch):
    def dense(layer, x):
        return functional.silu(normalised(layer.norm, layer.linear(x)))

    def convolve(layer, x, y, source, target):
        m = layer.source_gate(x)[source] + layer.target_gate(x)[target] + layer.edge_gate(y)
        gate = torch.sigmoid(m)
        received = summed(gate * layer.neighbour(x)[source], target, len(x))
        received = received / (summed(gate, target, len(x)) + 1e-6)
        x = x + functional.silu(normalised(layer.node_norm, layer.own(x) + received))
        return x, y + functional.silu(normalised(layer.edge_norm, m))

    source, target = batch.edge_source.tolist(), batch.edge_target.tolist()
    pairs = [(a, b) for b in range(len(source)) for a in range(len(target)) if target[a] == source[b]]
    first, second = torch.tensor(pairs).T
    # u -> v -> w: from v to u, and from v to w
    cosines = functional.cosine_similarity(batch.vectors[first], -batch.vectors[second])
    x = dense(encoder.atom_input, encoder.categories[batch.atomic_numbers - 1])
    centres = torch.linspace(0, 8, 80, dtype=torch.double)
    y = torch.exp(-79 / 8 * (batch.distances[:, None] - centres) ** 2)
    centres = torch.linspace(-1, 1, 40, dtype=torch.double)
    z = torch.exp(-39 / 2 * (cosines[:, None] - centres) ** 2)
    for layer in encoder.bond_input:
        y = dense(layer, y)
    for layer in encoder.angle_input:
        z = dense(layer, z)
    for on_atoms, on_bonds in encoder.alignn_layers:
        x, y = convolve(on_atoms, x, y, batch.edge_source, batch.edge_target)
        y, z = convolve(on_bonds, y, z, first, second)
    for layer in encoder.gcn_layers:
        x, y = convolve(layer, x, y, batch.edge_source, batch.edge_target)
    return x.mean(0, keepdim=True)


def cgcnn(encoder, batch):
    source, target, distance = bonds_of(batch)
    basis = torch.exp(-(((distance[:, None] - torch.arange(41) * 0.2) / 0.2) ** 2))
    x = encoder.node_input(encoder.categories[batch.atomic_numbers - 1])
    for layer in encoder.layers:
        z = normalised(layer.message_norm, layer.linear(torch.cat([x[target], x[source], basis], dim=1)))
        gate, message = z.chunk(2, dim=1)
        sent = torch.sigmoid(gate) * functional.softplus(message)
        x = functional.softplus(x + normalised(layer.sum_norm, summed(sent, target, len(x))))
    return functional.softplus(encoder.pool(functional.softplus(x.mean(0, keepdim=True))))


def megnet(encoder, batch):
    def dense(layers, x):
        for layer in layers:
            x = functional.softplus(layer(x)) - torch.log(torch.tensor(2.0, dtype=x.dtype))
        return x

    def read(pool, rows):
        memory = pool.project(rows)
        query = read = cell = torch.zeros(pool.width, dtype=rows.dtype)
        for _ in range(pool.steps):
            i, f, g, o = pool.gates(torch.cat([query, read])).chunk(4)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            query = torch.sigmoid(o) * torch.tanh(cell)
            read = (memory @ query).softmax(0) @ memory
        return torch.cat([query, read])

    source, target, distance = bonds_of(batch)
    centres = torch.linspace(0, 5, 100, dtype=torch.double)
    v = dense(encoder.atom_input, encoder.embedding(batch.atomic_numbers - 1))
    e = dense(encoder.bond_input, torch.exp(-(((distance[:, None] - centres) / 0.5) ** 2)))
    u = dense(encoder.state_input, torch.zeros(1, 2, dtype=torch.double))
    for block in encoder.blocks:
        before = block.before or [()] * 3
        v1, e1, u1 = (dense(layers, x) for layers, x in zip(before, (v, e, u), strict=True))
        e1 = dense(block.bond, torch.cat([v1[target], v1[source], e1, u1.expand(len(e1), -1)], dim=1))
        around = torch.stack([e1[target == i].mean(0) for i in range(len(v1))])
        v1 = dense(block.atom, torch.cat([around, v1, u1.expand(len(v1), -1)], dim=1))
        means = [e1.mean(0, keepdim=True), v1.mean(0, keepdim=True)]
        u1 = dense(block.state, torch.cat([*means, u1], dim=1))
        v, e, u = v + v1, e + e1, u + u1
    vectors = [read(encoder.pool_atoms, v), read(encoder.pool_bonds, e), u[0]]
    return dense(encoder.pool, torch.cat(vectors)[None])


@pytest.mark.parametrize("published", [alignn, cgcnn, megnet], ids=lambda function: function.__name__)
def test_crystal_vectors_are_those_of_the_published_form(published):
    name = published.__name__
    torch.manual_seed(4)
    encoder = StructureOnly({name: SMALL_ENCODERS[name]}).double().structure.train()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for crystal in (prototypes()["perovskite"], prototypes()["quartz"], varied_crystals()[7]):
            expected = published(encoder, cell_batch(name, crystal))
            torch.testing.assert_close(encoder(graph_batch(name, crystal)), expected, atol=1e-5, rtol=1e-5)
