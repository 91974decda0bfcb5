from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from castbench.errors import InputError
from castbench.models import build_model, build_pretraining
from castbench.models.batch import pad, unpad
from castbench.models.cross_attention import Fusion
from model_batches import join


@pytest.fixture
def cast(architecture, encoder):
    torch.manual_seed(2)
    return build_model("cast", architecture, encoder).eval()


@pytest.fixture
def batch(crystals):
    return join(crystals(3))


def test_fusion_has_1448448_parameters_at_the_papers_sizes():
    fusion = Fusion(128, 768, layers=4, heads=8, width=128, feedforward=512, dropout=0.0)
    assert sum(p.numel() for p in fusion.parameters()) == 1_448_448
    attention = [p for name, p in fusion.named_parameters() if "feedforward" not in name]
    assert sum(p.numel() for p in attention) == 920_576


def test_explicit_attention_equals_the_fast_path(cast, batch):
    nodes = cast.structure.nodes(batch)
    h_BND, _ = pad(nodes, batch.node_offsets)
    explicit, _ = cast.fusion.attend(h_BND, *pad(batch.token_states, batch.token_offsets), weights=True)
    fast = cast.fusion(nodes, batch.token_states, batch)
    torch.testing.assert_close(unpad(explicit, batch.node_offsets), fast, atol=1e-5, rtol=1e-5)


def test_layers_are_those_of_a_pre_norm_transformer(cast, crystals):
    """h + attention(norm(h), tokens), then h + feedforward(norm(h)) with GELU, a head after the other."""
    single = crystals(3)[1]
    h, tokens = cast.structure.nodes(single), single.token_states
    found = cast.fusion(h, tokens, single)
    for layer in cast.fusion:
        norm, widen, _, narrow = layer.feedforward
        q, k, v = layer.query(layer.norm(h)), layer.key(tokens), layer.value(tokens)
        parts = zip(*(x.split(4, dim=1) for x in (q, k, v)), strict=True)
        heads = [(a @ b.T / 2).softmax(dim=1) @ c for a, b, c in parts]
        h = h + layer.output(torch.cat(heads, dim=1))
        h = h + narrow(functional.gelu(widen(norm(h))))
    torch.testing.assert_close(found, h, atol=1e-5, rtol=1e-5)


def test_dropout_is_of_attention_and_of_the_feed_forward_block(architecture, encoder, batch):
    """Where all is dropped, the nodes are left as they were."""
    architecture["cross_attention"]["dropout"] = 1.0
    cast = build_model("cast", architecture, encoder)
    nodes = cast.structure.nodes(batch)
    assert torch.equal(cast.fusion(nodes, batch.token_states, batch), nodes)
    assert not torch.allclose(cast.eval().fusion(nodes, batch.token_states, batch), nodes)


def test_making_keys_and_meeting_the_states_are_the_same_function(cast, batch, monkeypatch):
    found = []
    for products in ((0, 1), (1, 0)):
        monkeypatch.setattr(cast.fusion, "_products", lambda *_, products=products: products)
        cast.zero_grad()
        states = batch.token_states.clone().requires_grad_()
        predicted = cast(replace(batch, token_states=states))
        (predicted * torch.tensor([1.0, -2.0, 3.0, -1.0, 2.0])).sum().backward()
        gradients = [p.grad.clone() for name, p in cast.named_parameters() if "key.bias" not in name]
        found.append([predicted.detach(), states.grad, *gradients])
    for made, met in zip(*found, strict=True):
        torch.testing.assert_close(met, made, atol=1e-5, rtol=1e-5)


def test_states_are_met_where_that_takes_fewer_products():
    fusion = Fusion(128, 768, layers=1, heads=8, width=128, feedforward=512, dropout=0.0)
    made, met = fusion._products(4, 250)
    assert met < made
    made, met = fusion._products(40, 250)
    assert made < met


@pytest.mark.parametrize("overhead", [0, 10_000, 10**12])
def test_groups_hold_each_crystal_once_and_change_nothing(cast, batch, monkeypatch, overhead):
    monkeypatch.setattr("castbench.models.cross_attention.OVERHEAD", {"cpu": overhead})
    groups = cast.fusion._groups(batch)
    assert sorted(torch.cat(groups).tolist()) == list(range(batch.n))
    assert len(groups) == {0: 5, 10_000: 2, 10**12: 1}[overhead]
    torch.testing.assert_close(cast(batch), cast.attention_maps(batch)[0], atol=1e-5, rtol=1e-5)


def test_attention_maps_come_with_the_same_predictions(cast, batch):
    torch.testing.assert_close(cast.attention_maps(batch)[0], cast(batch), atol=1e-5, rtol=1e-5)


def test_attention_weights_are_a_distribution_over_the_own_tokens(cast, batch):
    _, layers = cast.attention_maps(batch)
    assert len(layers) == 2
    nodes, tokens = batch.node_offsets.diff(), batch.token_offsets.diff()
    for weights_BHNT in layers:
        assert weights_BHNT.shape == (5, 4, int(nodes.max()), int(tokens.max()))
        for crystal, (n_nodes, n_tokens) in enumerate(zip(nodes.tolist(), tokens.tolist(), strict=True)):
            own = weights_BHNT[crystal, :, :n_nodes]
            torch.testing.assert_close(own[..., :n_tokens].sum(-1), torch.ones(4, n_nodes))
            assert not own[..., n_tokens:].any()
            assert own.min() >= 0
    assert layers[0][1, :, :4, :12].std(dim=-1).min() > 0  # not the same for every token


def test_attention_maps_match_a_loop_over_heads(cast, crystals):
    single = crystals(3)[1]
    _, layers = cast.attention_maps(single)
    layer, nodes, tokens = cast.fusion[0], cast.structure.nodes(single), single.token_states
    q, k = layer.query(layer.norm(nodes)), layer.key(tokens)
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        expected = (q[:, part] @ k[:, part].T / 2).softmax(dim=1)
        torch.testing.assert_close(layers[0][0, head], expected, atol=1e-5, rtol=1e-5)


def test_one_token_gets_all_attention(cast, crystals):
    _, layers = cast.attention_maps(crystals(3)[4])
    assert all((weights == 1).all() for weights in layers)


def test_every_token_matters_and_other_texts_do_not(cast, batch):
    batch = replace(batch, token_states=batch.token_states.clone().requires_grad_())
    cast(batch)[2].backward()
    start, stop = batch.token_offsets[2:4].tolist()
    touched = batch.token_states.grad.abs().sum(dim=1) > 0
    assert touched.nonzero().flatten().tolist() == list(range(start, stop))


def test_text_key_chooses_frozen_or_lora(architecture, encoder):
    assert build_model("cast", architecture, encoder).text_mode == "frozen"
    architecture["cross_attention"]["text"] = "lora"
    assert build_model("cast", architecture, encoder).text_mode == "lora"


def test_heads_that_do_not_divide_the_width_are_refused(architecture, encoder):
    architecture["cross_attention"]["heads"] = 3
    with pytest.raises(InputError, match="3 heads do not divide width 16"):
        build_model("cast", architecture, encoder)


@pytest.fixture
def pretraining(architecture, encoder):
    torch.manual_seed(2)
    return build_pretraining("masked_node", architecture, encoder).eval()


def test_masked_elements_do_not_leak(pretraining, batch):
    before = pretraining.logits(batch)
    other = torch.where(batch.masked_nodes, 119 - batch.atomic_numbers, batch.atomic_numbers)
    assert torch.equal(pretraining.logits(replace(batch, atomic_numbers=other)), before)
    assert not torch.allclose(
        pretraining.structure.nodes(batch), pretraining.structure.nodes(batch, pretraining.hidden)
    )


def test_masked_node_loss_counts_masked_nodes_alone(pretraining, batch):
    outcome, logits = pretraining(batch), pretraining.logits(batch)
    assert logits.shape == (16, 118)
    losses = [
        torch.nn.functional.cross_entropy(logits[i], batch.atomic_numbers[i] - 1)
        for i in batch.masked_nodes.nonzero().flatten()
    ]
    assert outcome.count == len(losses) == 9
    torch.testing.assert_close(outcome.loss, torch.stack(losses).mean())
    named = logits.argmax(dim=1) + 1 == batch.atomic_numbers
    assert int(outcome.correct) == int((named & batch.masked_nodes).sum())


def test_masked_node_task_can_be_learned_from_the_text(pretraining, crystals):
    """One crystal of five whose texts differ: the loss must fall far below chance (log 118 = 4.8)."""
    batch = join(crystals(3))
    optimiser = torch.optim.AdamW(pretraining.parameters(), lr=3e-3)
    first = pretraining(batch).loss.item()
    for _ in range(60):
        optimiser.zero_grad()
        loss = pretraining(batch).loss
        loss.backward()
        optimiser.step()
    assert first > 4 and pretraining(batch).loss.item() < 1
