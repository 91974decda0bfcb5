"""The composition models: shapes, padding, order, gradients, attention."""

import pytest
import torch

from castbench.compositions.descriptors import descriptor_matrix
from castbench.compositions.formulas import encode_formulas
from castbench.errors import InputError
from castbench.models import COMPOSITION_REGISTRY, build_composition_model
from castbench.models.composition import CompositionBatch, CompositionNetwork, Compositions
from castbench.models.edm_transformer import EDMTransformer

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


def test_heads_must_divide_the_width():
    wrong = {"edm_transformer": ARCHITECTURE["edm_transformer"] | {"width": 50}}
    with pytest.raises(InputError, match="12 heads do not divide width 50"):
        build_composition_model("edm_transformer", wrong, ["band_gap"])
