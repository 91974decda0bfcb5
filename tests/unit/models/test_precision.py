"""The way of bf16-mixed, on the CPU: every model under autocast, from states in bfloat16."""

from dataclasses import replace

import pytest
import torch

from castbench.models import REGISTRY, build_model
from model_batches import join, only


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
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(batch)
    rounded.sum().backward()
    assert (rounded - exact).norm() < 0.05 * (1 + exact.norm())
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    difference = sum((found[name] - gradients[name]).square().sum() for name in found) ** 0.5
    assert difference < 0.1 * sum(value.square().sum() for value in gradients.values()) ** 0.5
