"""The way of bf16-mixed, on the CPU: every model as Fabric calls it, from states in bfloat16."""

from dataclasses import fields, replace

import pytest
import torch

from castbench.models import REGISTRY, build_model
from castbench.models.batch import rows_at, sums_of
from castbench.models.structure import ENCODERS, StructureOnly
from castbench.training.session import make_fabric
from crystals import prototypes
from model_batches import SMALL_ENCODERS, graph_batch, join, only


@pytest.mark.parametrize("name", ENCODERS)
def test_every_structure_encoder_trains(name):
    """Batch normalisation too, whose statistics stay float32."""
    torch.manual_seed(0)
    network = StructureOnly({name: SMALL_ENCODERS[name]}).train()
    batch = join([graph_batch(name, structure) for structure in prototypes().values()])
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    double = [name for name, x in values.items() if torch.is_tensor(x) and x.dtype == torch.float64]
    batch = replace(batch, **{name: values[name].float() for name in double})
    exact = network(batch)
    fabric = make_fabric("cpu", "bf16-mixed")
    rounded = fabric.setup(network)(batch)
    fabric.backward(rounded.sum())
    assert (rounded - exact).norm() < 0.05 * (1 + exact.norm())
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_sums_are_in_float32():
    values = torch.ones(257, 3, dtype=torch.bfloat16)  # there is no 257 in bfloat16
    assert sums_of(values, torch.zeros(257, dtype=torch.long), 2)[:, 0].tolist() == [257, 0]


def test_gradients_of_a_rows_copies_are_added_in_float32():
    values = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    index = torch.ones(10_000, dtype=torch.long)
    rows_at(values, index).backward(torch.ones(10_000, 3, dtype=torch.bfloat16))  # 256 + 1 is 256 there
    assert torch.equal(values.grad, torch.tensor([[0.0] * 3, [10_000.0] * 3], dtype=torch.bfloat16))


class Looking(torch.nn.Module):
    """Keeps the batch that it is given."""

    def forward(self, batch):
        self.batch = batch
        return torch.zeros(1, requires_grad=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_distances_and_counts_are_not_rounded(precision):
    batch = graph_batch("cogn", prototypes()["perovskite"])
    given = {"distances": batch.distances.float() / 3, "multiplicities": batch.multiplicities.float() + 300}
    network = make_fabric("cpu", precision).setup(Looking())
    network(replace(batch, **given))
    for name, values in given.items():
        seen = getattr(network.batch, name)
        assert seen.dtype == torch.float32 and torch.equal(seen, values)


@pytest.mark.parametrize("model", REGISTRY)
@pytest.mark.parametrize("text", ["frozen", "lora"])
def test_predictions_and_gradients_are_those_of_float32_to_bfloat16s_rounding(
    architecture, encoder, crystals, model, text
):
    architecture["cross_attention"]["text"] = text
    torch.manual_seed(0)
    network = build_model(model, architecture, encoder).eval()
    batch = only(join(crystals(network.text_layer)), network.needs)
    exact = network(batch)
    exact.sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    for name in ("token_states", "cls_states"):
        if (states := getattr(batch, name)) is not None:
            batch = replace(batch, **{name: states.bfloat16()})
    fabric = make_fabric("cpu", "bf16-mixed")
    rounded = fabric.setup(network)(batch)
    fabric.backward(rounded.sum())
    assert (rounded - exact).norm() < 0.05 * (1 + exact.norm())
    assert not torch.equal(rounded, rounded.bfloat16().float())  # the last layer is exact
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    difference = sum((found[name] - gradients[name]).square().sum() for name in found) ** 0.5
    assert difference < 0.1 * sum(value.square().sum() for value in gradients.values()) ** 0.5
