"""What must hold for every registered model and pretraining network."""

from dataclasses import replace

import pytest
import torch

from castbench.errors import InputError
from castbench.labels import MODELS
from castbench.models import OBJECTIVES, REGISTRY, build_model, build_pretraining, load_pretrained
from castbench.models.structure import ENCODERS
from model_batches import join, only

OTHERS = [  # with each of the other structure encoders
    f"{name}-{structure}"
    for structure in ENCODERS
    for name in ("structure_only", "crysmmnet_lora", "multimat", "cast", *OBJECTIVES)
    if structure != "cogn"
]


@pytest.fixture
def architecture(request, architecture_with):
    """The small settings, with the structure encoder that the network's parameter names."""
    names = request.node.callspec.params.get("network", "") if hasattr(request.node, "callspec") else ""
    return architecture_with(next((name for name in ENCODERS if names.endswith(f"-{name}")), "cogn"))


@pytest.fixture(params=[*REGISTRY, *OBJECTIVES, "cast-lora", "masked_node-lora", "text_only-all", *OTHERS])
def network(request, architecture, encoder):
    name, _, setting = request.param.partition("-")
    if setting == "lora":
        architecture["cross_attention"]["text"] = "lora"
    if setting == "all":
        architecture["lora"]["layers"] = "all"
    torch.manual_seed(0)
    build = build_pretraining if name in OBJECTIVES else build_model
    network = build(name, architecture, encoder).eval()
    with torch.no_grad():  # LoRA starts at zero: move off it, so that the tests see it
        for parameter in network.parameter_groups()["lora"]:
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, parameter in network.named_parameters():  # zero biases keep MEGNet's state at zero
            if name.startswith("structure.") and name.endswith("bias") and parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.fixture
def singles(network, crystals):
    return [only(crystal, network.needs) for crystal in crystals(network.text_layer)]


def outputs(network, batch):
    """Something to compare for each crystal: its prediction, or the state that the loss is made of."""
    if hasattr(network, "logits"):
        return network.logits(batch)
    if hasattr(network, "project_text") and hasattr(network, "temperature"):
        return torch.cat([network.structure(batch), network.project_text(network.text.cls(batch))], dim=1)
    return network(batch)


def loss_of(network, batch):
    out = network(batch)
    return out.loss if hasattr(out, "loss") else (out - batch.targets).square().mean()


def test_registry_has_the_published_names():
    assert list(REGISTRY) == list(MODELS)


def test_batched_equals_one_by_one(network, singles):
    together = outputs(network, join(singles))
    alone = torch.cat([outputs(network, single) for single in singles])
    assert together.shape == alone.shape
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.std() > 0


def test_order_of_nodes_and_edges_does_not_matter(network, singles):
    if "graph" not in network.needs:
        pytest.skip("reads no graph")
    batch = singles[3]
    node, edge = torch.randperm(len(batch.atomic_numbers)), torch.randperm(len(batch.distances))
    place = node.argsort()
    shuffled = replace(
        batch,
        atomic_numbers=batch.atomic_numbers[node],
        multiplicities=batch.multiplicities[node],
        masked_nodes=batch.masked_nodes[node],
        edge_source=place[batch.edge_source[edge]],
        edge_target=place[batch.edge_target[edge]],
        edge_reverse=edge.argsort()[batch.edge_reverse[edge]],
        **{
            name: getattr(batch, name)[edge]
            for name in ("distances", "edge_multiplicities", "vectors", "ridge_areas")
        },
    )
    expected = outputs(network, batch)
    expected = expected[node] if hasattr(network, "logits") else expected
    torch.testing.assert_close(outputs(network, shuffled), expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_what_is_trainable_and_nothing_else(network, singles):
    network.train()
    loss_of(network, join(singles)).backward()
    groups = network.parameter_groups()
    trainable = {id(p) for group in groups.values() for p in group}
    assert trainable == {id(p) for p in network.parameters() if p.requires_grad}
    assert bool(groups["lora"]) == (network.text_mode == "lora")
    for name, parameter in network.named_parameters():
        if id(parameter) not in trainable:
            assert parameter.grad is None, name
        elif not name.endswith("key.bias"):  # shifts all scores of a query alike: no effect, no gradient
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_trained_state_rebuilds_the_model(network, singles, architecture, encoder):
    batch = join(singles)
    state = {name: value.clone() for name, value in network.trained_state().items()}
    assert all("embeddings" not in name for name in state)
    expected = outputs(network, batch)
    with torch.no_grad():
        for group in network.parameter_groups().values():
            for parameter in group:
                parameter.normal_()
    assert not torch.allclose(outputs(network, batch), expected)
    network.load_trained_state(state)
    assert torch.equal(outputs(network, batch), expected)


def test_trained_state_of_another_architecture_is_refused(network):
    state = network.trained_state()
    name = next(iter(state))
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        network.load_trained_state({key: value for key, value in state.items() if key != name})
    with pytest.raises(InputError, match="does not fit"):
        network.load_trained_state(state | {name: state[name][..., :1]})


def test_evaluation_and_training_are_deterministic(network, singles):
    batch = join(singles)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        network.train().zero_grad()
        loss = loss_of(network, batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("text", ["frozen", "lora"])
def test_cast_starts_from_masked_node_pretraining(text, architecture, encoder):
    architecture["cross_attention"]["text"] = text
    pretrained = build_pretraining("masked_node", architecture, encoder).trained_state()
    model = build_model("cast", architecture, encoder)
    head = model.head[0].weight.clone()
    load_pretrained(model, pretrained)
    state = model.trained_state()
    shared = [name for name in state if not name.startswith("head")]
    assert {name.split(".")[0] for name in shared} >= {"structure", "fusion"}
    assert any(".lora_" in name for name in shared) == (text == "lora")
    assert all(torch.equal(state[name], pretrained[name]) for name in shared)
    assert torch.equal(model.head[0].weight, head)


def test_multimat_starts_from_contrastive_pretraining(architecture, encoder):
    pretraining = build_pretraining("contrastive", architecture, encoder)
    model = build_model("multimat", architecture, encoder)
    assert not torch.equal(
        model.structure.node_input.linear.weight, pretraining.structure.node_input.linear.weight
    )
    load_pretrained(model, pretraining.trained_state())
    assert torch.equal(
        model.structure.node_input.linear.weight, pretraining.structure.node_input.linear.weight
    )


def test_pretrained_state_of_another_architecture_is_refused(architecture, encoder):
    model = build_model("cast", architecture, encoder)
    with pytest.raises(InputError, match=r"fusion\..* is absent"):
        load_pretrained(model, build_pretraining("contrastive", architecture, encoder).trained_state())
    architecture["cogn"]["width"] = 8
    with pytest.raises(InputError, match="does not fit"):
        load_pretrained(model, build_pretraining("masked_node", architecture, encoder).trained_state())


def test_unknown_names_are_refused(architecture):
    with pytest.raises(InputError, match="gpt: no such model; choose from structure_only"):
        build_model("gpt", architecture, None)
    with pytest.raises(InputError, match="no such objective"):
        build_pretraining("gpt", architecture, None)
