"""The composition models: shapes, padding, order, gradients, attention."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from castbench.compositions.descriptors import N_MAT2VEC, descriptor_matrix, element_table
from castbench.compositions.formulas import encode_formulas
from castbench.errors import InputError
from castbench.models import COMPOSITION_REGISTRY, build_composition_model
from castbench.models.composition import CompositionBatch, CompositionNetwork, Compositions
from castbench.models.crabnet import FractionEncoding
from castbench.models.edm_transformer import EDMTransformer, EncoderLayer

ARCHITECTURE = {
    "edm_transformer": {"width": 48, "layers": 2, "heads": 12, "feedforward": 64, "dropout": 0.1},
    "crabnet": {"width": 32, "layers": 2, "heads": 4, "feedforward": 32, "dropout": 0.1},
}
FORMULAS = ["CaTiO3", "Al2O3", "Si", "Ca(MgFe)2"]


def batch(formulas: list[str] = FORMULAS, slots: int = 4) -> CompositionBatch:
    numbers, fractions = encode_formulas(formulas, slots)
    source = Compositions(torch.from_numpy(numbers), torch.from_numpy(fractions), torch.device("cpu"))
    return source.batch(torch.arange(len(formulas)))


@pytest.fixture(params=["crabnet", "edm_transformer"])
def network(request: pytest.FixtureRequest) -> CompositionNetwork:
    torch.manual_seed(0)
    return build_composition_model(request.param, ARCHITECTURE, ["band_gap", "stability"]).eval()


def test_every_registered_model_answers_every_target():
    for name in COMPOSITION_REGISTRY:
        for targets in (["stability"], ["band_gap", "formation_energy", "stability", "metallicity"]):
            found = build_composition_model(name, ARCHITECTURE, targets)(batch())
            assert list(found) == targets
            assert all(values.shape == (len(FORMULAS),) for values in found.values())


def test_an_unknown_model_is_named():
    with pytest.raises(InputError, match="edm_x"):
        build_composition_model("edm_x", ARCHITECTURE, ["band_gap"])


def test_a_batch_is_trimmed_to_its_longest_formula():
    assert batch().numbers.shape == (4, 3)
    assert batch(["Si", "Al2O3"]).numbers.shape == (2, 2)


def test_padding_and_the_batch_change_nothing(network: CompositionNetwork):
    with torch.no_grad():
        together = network(batch())
        numbers, fractions = encode_formulas(FORMULAS, 8)
        untrimmed = network(CompositionBatch(torch.from_numpy(numbers).long(), torch.from_numpy(fractions)))
        for row, formula in enumerate(FORMULAS):
            for target, alone in network(batch([formula])).items():
                assert together[target][row] == pytest.approx(float(alone), abs=1e-5)
                assert untrimmed[target][row] == pytest.approx(float(alone), abs=1e-5)


def test_a_formula_is_a_set(network: CompositionNetwork):
    own = batch()
    turned = CompositionBatch(own.numbers.flip(1), own.fractions.flip(1))
    with torch.no_grad():
        for first, second in zip(network(own).values(), network(turned).values(), strict=True):
            assert torch.allclose(first, second, atol=1e-5)


def test_elements_and_fractions_matter(network: CompositionNetwork):
    with torch.no_grad():
        values = network(batch(["CaTiO3", "SrTiO3", "Ca2TiO4"]))["band_gap"]
    assert len(set(values.tolist())) == 3


def test_every_parameter_learns(network: CompositionNetwork):
    network.train()
    sum(values.square().sum() for values in network(batch()).values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_every_dropout_is_that_of_the_section(network: CompositionNetwork):
    assert {part.p for part in network.modules() if isinstance(part, nn.Dropout)} == {0.1}


def test_every_parameter_is_in_one_group(network: CompositionNetwork):
    grouped = [id(p) for group in network.parameter_groups().values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())
    if isinstance(network, EDMTransformer):
        assert network.parameter_groups()["encoder"]


def test_learned_task_weights_are_parameters_only_where_asked_for():
    plain, learned = (
        build_composition_model("edm_transformer", ARCHITECTURE, ["band_gap", "stability"], kind)
        for kind in ("sum", "learned")
    )
    assert set(learned.trained_state()) - set(plain.trained_state()) == {"log_variances"}


def test_the_descriptor_is_that_of_the_heatmap():
    network = build_composition_model("edm_transformer", ARCHITECTURE, ["band_gap"])
    numbers, fractions = encode_formulas(FORMULAS, 3)
    found = network.descriptor(batch())
    # The last bit of an angle of some hundred, which machines round differently, is 6e-5.
    assert torch.allclose(found, torch.from_numpy(descriptor_matrix(numbers, fractions)), atol=1e-4)


def test_attention_sums_to_one_and_ignores_padding():
    torch.manual_seed(0)
    network = build_composition_model("edm_transformer", ARCHITECTURE, ["band_gap"]).eval()
    with torch.no_grad():
        states, mask, maps = network.encode(batch(), weights=True)
        fast, _, none = network.encode(batch())
    assert len(maps) == 2
    assert none == []
    assert torch.allclose(states, fast, atol=1e-5)
    for weights in maps:
        assert weights.shape == (4, 12, 4, 4)
        assert torch.allclose(weights.sum(dim=-1), torch.ones(4, 12, 4), atol=1e-5)
        assert not weights.masked_select(~mask[:, None, None, :]).any()


def test_pooling_joins_four_vectors_without_padding():
    network = build_composition_model("edm_transformer", ARCHITECTURE, ["band_gap"]).eval()
    with torch.no_grad():
        states, mask, _ = network.encode(batch(["Al2O3", "CaTiO3"]))
        pooled = network.pool(states, mask).unflatten(1, (4, -1))
    assert torch.equal(pooled[:, 0], states[:, 0])
    assert torch.allclose(pooled[0, 2], states[0, 1:3].amax(dim=0))
    assert torch.allclose(pooled[0, 3], states[0, 1:3].mean(dim=0), atol=1e-6)


def test_a_layer_is_that_of_torch_with_the_same_weights():
    """Normalised behind each residual, ReLU in between (report, section 5.9)."""
    torch.manual_seed(0)
    ours = EncoderLayer(48, 12, 64, 0.1).eval()
    theirs = nn.TransformerEncoderLayer(48, 12, 64, 0.1, batch_first=True).eval()
    attention, (widen, _, _, narrow) = ours.attention, ours.feedforward
    query, key, value = attention.projections
    weights = {
        "self_attn.in_proj_weight": torch.cat([query.weight, key.weight, value.weight]),
        "self_attn.in_proj_bias": torch.cat([query.bias, key.bias, value.bias]),
    }
    pairs = {"self_attn.out_proj": attention.output, "linear1": widen, "linear2": narrow}
    pairs |= {f"norm{i + 1}": norm for i, norm in enumerate(ours.norms)}
    for name, part in pairs.items():
        weights |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
    theirs.load_state_dict(weights)
    h, mask = torch.randn(2, 5, 48), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        expected = theirs(h, src_key_padding_mask=~mask)
        torch.testing.assert_close(ours(h, mask)[0][mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_dropout_of_a_layer_is_of_attention_and_of_the_feed_forward_block():
    """Where all is dropped, the states are normalised twice."""
    layer, h = EncoderLayer(48, 12, 64, 1.0), torch.randn(2, 5, 48)
    first, second = layer.norms
    assert torch.equal(layer(h, torch.ones(2, 5, dtype=torch.bool))[0], second(first(h)))


def test_a_learned_query_attends_to_cls_and_the_elements():
    torch.manual_seed(0)
    network = build_composition_model("edm_transformer", ARCHITECTURE, ["band_gap"]).eval()
    pool = network.pool
    query, key, value = pool.attention.projections
    with torch.no_grad():
        states, mask, _ = network.encode(batch(["Al2O3", "CaTiO3"]))
        found = network.pool(states, mask).unflatten(1, (4, -1))[0, 1]
        q, k, v = query(pool.query), key(states[0, :3]), value(states[0, :3])
        heads = [(k[:, part] @ q[part] / 2).softmax(dim=0) @ v[:, part] for part in torch.arange(48).split(4)]
        torch.testing.assert_close(found, pool.attention.output(torch.cat(heads)), atol=1e-5, rtol=1e-5)


def test_an_answer_is_that_of_the_pooled_vectors_through_trunk_and_head():
    network = build_composition_model("edm_transformer", ARCHITECTURE, ["band_gap", "stability"]).eval()
    norm, wide, *_ = network.trunk
    with torch.no_grad():
        states, mask, _ = network.encode(batch())
        shared = functional.gelu(wide(norm(network.pool(states, mask))))
        for target, values in network(batch()).items():
            first, *_, last = network.heads[target]
            torch.testing.assert_close(values, last(functional.gelu(first(shared))).squeeze(1))


def test_crabnets_fractions_are_sinusoids_on_two_scales():
    encode = FractionEncoding(16)
    with torch.no_grad():
        encode.scales.copy_(torch.tensor([2.0, 3.0]))
        for x in (0.2, 0.6, 1.0):
            expected = []
            for scale, value in ((2, x), (3, min(0.0025 * math.log2(x) ** 2, 1.0))):
                angles = [value * 5000 / 50 ** (i / 4) for i in range(4)]
                expected += [scale * f(angle) for f in (math.sin, math.cos) for angle in angles]
            assert encode(torch.tensor([x]))[0].tolist() == pytest.approx(expected, abs=1e-3)


def test_crabnets_answer_is_the_gated_mean_of_its_elements():
    torch.manual_seed(0)
    network = build_composition_model("crabnet", ARCHITECTURE, ["band_gap", "stability"]).eval()
    own, table = batch(["Al2O3"]), torch.from_numpy(element_table())[:, :N_MAT2VEC]
    with torch.no_grad():
        network.element_scale.fill_(1.5)
        x = 2**1.5 * network.project(table[own.numbers]) + network.encode_fractions(own.fractions)
        x = network.encoder(x)
        for layer, skip in zip(network.head.layers, network.head.skips, strict=True):
            x = functional.leaky_relu(layer(x)) + skip(x)
        values = network.head.output(x)[0]
        for column, found in enumerate(network(own).values()):
            expected = (values[:, column] * values[:, column + 2].sigmoid()).mean()
            torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_heads_must_divide_the_width():
    wrong = {"edm_transformer": ARCHITECTURE["edm_transformer"] | {"width": 50}}
    with pytest.raises(InputError, match="12 heads do not divide width 50"):
        build_composition_model("edm_transformer", wrong, ["band_gap"])
    wrong = {"crabnet": ARCHITECTURE["crabnet"] | {"width": 34}}
    with pytest.raises(InputError, match="width 34 is not a multiple of 4 and of 4 heads"):
        build_composition_model("crabnet", wrong, ["band_gap"])
