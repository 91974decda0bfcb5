"""Explicit attention of every model that reads text: same outputs, rows sum to 1, nothing at padding."""

import pytest
import torch

from castbench.config import MODELS
from castbench.models import build_model
from castbench.models.text import TextEncoder
from castbench.text.encoders import LayeredEncoder
from model_batches import join, only

FROM_IDS = (*(name for name, (text, *_) in MODELS.items() if text != "none"), "cast-lora")
CACHED = ("text_only", "crysmmnet_lora", "cast", "cast-lora")


def build(name, architecture, encoder):
    name, _, setting = name.partition("-")
    if setting == "lora":
        architecture["cross_attention"]["text"] = "lora"
    torch.manual_seed(0)
    network = build_model(name, architecture, encoder).eval()
    with torch.no_grad():  # LoRA starts at zero: move off it, so that the tests see it
        for parameter in network.parameter_groups()["lora"]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.fixture(params=[*(f"{name}/ids" for name in FROM_IDS), *(f"{name}/cached" for name in CACHED)])
def network(request, architecture, encoder):
    name, kind = request.param.split("/")
    network = build(name, architecture, encoder)
    if kind == "ids":
        network.text.read_ids(encoder)
    return network


def test_explicit_attention_gives_the_same_predictions(network, crystals):
    batch = only(join(crystals(network.text_layer)), network.needs)
    explicit, maps = network.attention_maps(batch)
    torch.testing.assert_close(explicit, network(batch), atol=1e-5, rtol=1e-5)
    assert maps and explicit.std() > 0


def test_rows_sum_to_one_over_real_tokens_and_padding_gets_nothing(network, crystals):
    batch = only(join(crystals(network.text_layer)), network.needs)
    tokens = batch.token_offsets.diff().tolist()
    nodes = batch.node_offsets.diff().tolist() if batch.node_offsets is not None else None
    for weights in network.attention_maps(batch)[1]:
        for crystal, n_tokens in enumerate(tokens):
            rows = weights[crystal]  # (H, T), or (H, N, T)
            rows = rows[:, : nodes[crystal]] if rows.dim() == 3 else rows
            torch.testing.assert_close(rows[..., :n_tokens].sum(-1), torch.ones(rows.shape[:-1]))
            assert not rows[..., n_tokens:].any() and rows.min() >= 0


@pytest.mark.parametrize("name", FROM_IDS)
def test_from_token_ids_a_model_predicts_what_it_does_from_cached_states(
    name, architecture, encoder, crystals
):
    network = build(name, architecture, encoder)
    cached = network(only(join(crystals(network.text_layer)), network.needs))
    network.text.read_ids(encoder)
    assert network.needs >= {"token_ids"} and network.text_layer is None
    torch.testing.assert_close(network(only(join(crystals()), network.needs)), cached, atol=1e-5, rtol=1e-5)


def test_the_encoders_explicit_path_is_its_fast_one(encoder, crystals):
    model, batch = LayeredEncoder.from_folder(encoder), join(crystals())
    text = TextEncoder(encoder, None)
    text.read_ids(encoder)
    with torch.no_grad():
        states, maps = text.attend(batch)
        torch.testing.assert_close(states, text(batch), atol=1e-5, rtol=1e-5)
    assert len(maps) == model.n_layers and maps[0].shape[:2] == (5, 4)


def test_cached_states_tell_no_attention(architecture, encoder, crystals):
    network = build("crysmmnet_frozen", architecture, encoder)
    with pytest.raises(ValueError, match="read_ids"):
        network.attention_maps(only(join(crystals(3)), network.needs))
