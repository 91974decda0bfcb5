"""Padded batches, and training on them: as on a GPU, but run here and not recorded."""

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import interpreter
from castbench.models import bert, build_model, build_pretraining, text
from castbench.models.batch import segments
from castbench.text import encoders
from castbench.training import dataset, loop
from castbench.training.dataset import Crystals
from castbench.training.objectives import MaskedNode, Pretraining, Regression

MODELS = ("structure_only", "crysmmnet_frozen", "cast_scratch")
LORA = [
    pytest.param(name, marks=pytest.mark.skipif(not interpreter.AVAILABLE, reason="its kernels need triton"))
    for name in ("text_only", "crysmmnet_lora")
]
OBJECTIVES = {"masked_node": MaskedNode, "contrastive": Pretraining}
ROWS = torch.tensor([3, 0, 11, 21, 30, 3, 8])


class Direct:
    """In the place of `Recorder`: runs what would be replayed, and sees to it that a key has one shape."""

    def __init__(self, device, state):
        self.shapes, self.functions = {}, {}
        assert all(isinstance(value, torch.Tensor) for value in state())

    def record(self, key, function, *inputs):
        shapes = [value.shape for value in inputs]
        assert self.shapes.setdefault(key, shapes) == shapes
        self.functions[key] = function

    def replay(self, key, *inputs):
        return self.functions[key](*(value.clone() for value in inputs))

    def run(self, key, function, *inputs):
        self.record(key, function, *inputs)
        return self.replay(key, *inputs)


@pytest.fixture
def padded(monkeypatch):
    """Batches are padded on the CPU too."""
    monkeypatch.setattr(Crystals, "pads", property(lambda self: self.takes_padded))
    monkeypatch.setattr(loop, "Recorder", Direct)


def make(data, name, layers=1):
    """Network without dropout, crystals; "cast_lora" is CAST with LoRA's text, on so many layers."""
    architecture = data.settings(name)["architecture"]
    architecture = architecture | {
        part: architecture[part] | {"dropout": 0.0} for part in ("concat", "cross_attention", "lora")
    }
    caches = data.caches(name)
    if name == "cast_lora":
        name, caches = "cast_scratch", data.caches("text_only")
        architecture["cross_attention"] |= {"text": "lora"}
    architecture["lora"]["layers"] = layers
    torch.manual_seed(0)
    build = build_pretraining if name in OBJECTIVES else build_model
    network = build(name, architecture, data.root / "encoder")
    paths = {key: path for key, path in caches.items() if key != "encoder"}
    return network, Crystals(network, **paths, device=torch.device("cpu"))


@pytest.fixture(params=[False, True], ids=["by_operations", "by_kernels"])
def by_kernels(request, monkeypatch):
    """What kernels stand for is done by operations, and by kernels in the interpreter."""
    if request.param and not interpreter.AVAILABLE:
        pytest.skip("kernels need triton")
    if request.param:
        monkeypatch.setattr("castbench.kernels.usable", lambda *_: True)


@pytest.mark.parametrize("name", MODELS)
def test_predictions_and_gradients_are_those_of_the_crystals_alone(data, name, by_kernels):
    network, crystals = make(data, name)
    see_the_same(network, crystals.padded(ROWS, crystals.sizes(ROWS)), crystals.batch(ROWS))


@pytest.mark.parametrize(
    ("name", "layers", "fused"),
    [("text_only", 1, False), ("text_only", "all", True), ("crysmmnet_lora", "all", False)],
)
def test_different_texts_of_a_padded_batch_are_read_as_those_of_the_crystals(
    data, name, layers, fused, monkeypatch
):
    """With empty texts in front, and behind them nothing, one token, or more than a text has."""
    network, crystals = make(data, name, layers)
    with torch.no_grad():
        for key, value in network.named_parameters():
            value += 0.3 * torch.randn_like(value) if ".lora_" in key else 0.0
    kernels = ("batches", "cross_attention", "self_attention")
    monkeypatch.setattr("castbench.kernels.usable", lambda kernel, *_: kernel in kernels)
    monkeypatch.setattr(bert, "compiled_layer", bert.fused_layer)
    same, without = torch.tensor([3, 5, 3, 3]), torch.tensor([11, 11])
    for rows, pads in ((ROWS, 0), (ROWS, 100), (ROWS[:1], 1), (same, 0), (without, 1)):
        texts = crystals.texts(rows)
        sizes = crystals.sizes(rows, *texts)
        tokens = int(crystals.tokens.lengths(texts[0]).sum())
        assert tokens <= sizes.tokens < tokens + 16
        batch = crystals.padded(rows, sizes._replace(tokens=tokens + pads), *texts)
        with monkeypatch.context() as patch:
            patch.setattr(encoders, "is_fused", lambda hidden: fused)
            found = outcome(network, batch)
        see_close(network, found, outcome(network, crystals.batch(rows)))


@pytest.mark.parametrize("name", ["structure_only", "crysmmnet_lora", "cast_lora"])
def test_graphs_can_be_those_of_a_padded_batch_where_nothing_pads(data, name, by_kernels, monkeypatch):
    network, crystals = make(data, name)
    assert not crystals.pads_graphs and crystals.unpadded(ROWS).sizes is None  # not on a GPU
    monkeypatch.setattr(Crystals, "pads_graphs", property(lambda self: self.encoder_takes_padded))
    batch, wanted = crystals.unpadded(ROWS), crystals.batch(ROWS)
    assert len(batch.atomic_numbers) == len(wanted.atomic_numbers) and batch.edge_starts is not None
    see_the_same(network, batch, wanted)
    see_the_same(network, crystals.unpadded(ROWS[:1]), crystals.batch(ROWS[:1]))


def see_the_same(network, batch, other):
    """Predictions and gradients of a network on two forms of the same crystals."""
    see_close(network, outcome(network, batch), outcome(network, other))


def outcome(network, batch):
    """Predictions, and gradients of a sum of them."""
    found, weights = network(batch), torch.arange(batch.n) + 0.5
    return found, *torch.autograd.grad((found * weights).sum(), trained(network).values())


def see_close(network, found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    for parameter, one, other in zip(trained(network), found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * (1 + other.abs().max()), msg=parameter)


def trained(network):
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def test_a_padded_batch_has_its_sizes_and_one_crystal_that_is_none(data):
    _, crystals = make(data, "cast_scratch")
    sizes, plain = crystals.sizes(ROWS), crystals.batch(ROWS)
    batch = crystals.padded(ROWS, sizes)
    assert batch.n == sizes.crystals == len(ROWS) == 7
    assert len(batch.atomic_numbers) == sizes.nodes > len(plain.atomic_numbers)
    assert len(batch.distances) == sizes.edges > len(plain.distances)
    assert len(batch.token_states) == sizes.tokens > len(plain.token_states)
    assert batch.node_offsets.tolist() == [*plain.node_offsets.tolist(), sizes.nodes]
    n, e = len(plain.atomic_numbers), len(plain.distances)
    atoms = torch.segment_reduce(plain.multiplicities, "sum", offsets=plain.node_offsets)
    assert torch.equal(batch.shares[:n], plain.multiplicities / atoms[segments(plain.node_offsets)])
    assert not batch.shares[n:].any()
    assert not batch.multiplicities[n:].any() and not batch.edge_multiplicities[e:].any()
    for name in ("edge_source", "edge_target", "distances", "edge_multiplicities"):
        assert torch.equal(getattr(batch, name)[:e], getattr(plain, name)), name
    assert (batch.edge_source[e:] == n).all() and (batch.edge_target[e:] == n).all()
    for node in range(n):
        entering = torch.arange(*batch.edge_starts[node : node + 2].tolist())
        leaving = batch.source_order[slice(*batch.source_starts[node : node + 2].tolist())]
        assert entering.tolist() == (plain.edge_target == node).nonzero().flatten().tolist()
        assert leaving.tolist() == (plain.edge_source == node).nonzero().flatten().tolist()
    assert batch.edge_starts[n:].eq(e).all() and batch.source_starts[n:].eq(e).all()


def test_a_padded_batch_of_cls_alone_has_no_other_tokens(data):
    _, crystals = make(data, "contrastive")
    sizes = crystals.sizes(ROWS)
    assert sizes == make(data, "structure_only")[1].sizes(ROWS)
    batch, plain = crystals.padded(ROWS, sizes), crystals.batch(ROWS)
    assert batch.token_states is batch.token_offsets is None
    assert torch.equal(batch.cls_states, plain.cls_states)


def test_sizes_are_few_and_above_what_they_hold(data):
    assert [dataset._above(n) for n in (0, 7, 8, 31, 32, 39, 40, 1000, 1024)] == [
        8, 8, 16, 32, 40, 40, 48, 1024, 1280,
    ]  # fmt: skip
    assert [dataset._from(n, 16) for n in (1, 31, 32, 33, 64, 65, 16384, 16385)] == [
        2, 32, 32, 34, 64, 68, 16384, 17408,
    ]  # fmt: skip
    found = {dataset._above(n) for n in range(1024, 2048)}
    assert len(found) == 4 and all(dataset._above(n) > n for n in range(3000))
    _, crystals = make(data, "structure_only")
    generator = torch.Generator().manual_seed(0)
    every = {crystals.sizes(torch.randint(0, 40, (16,), generator=generator)) for _ in range(100)}
    assert len(every) <= 4


@pytest.mark.parametrize("name", [*MODELS, *OBJECTIVES, *LORA])
def test_training_takes_the_same_way(data, name, monkeypatch, request):
    histories = []
    for pads in (False, True):
        if pads:
            request.getfixturevalue("padded")
        trainer = trainer_of(data, name)
        trainer.module.train()
        losses = [float(trainer.advance(rows)) for rows in torch.arange(30).split(8) * 2]
        trainer.module.eval()
        histories.append([*losses, *trainer.objective.validate(trainer.module).values()])
        assert (trainer.recorder is not None) is pads
    assert histories[0] == pytest.approx(histories[1], rel=2e-3)
    assert histories[0][0] == pytest.approx(histories[1][0], rel=1e-5)


def trainer_of(data, name, layers=1):
    """A trainer on the first 30 crystals, with the last for validation."""
    network, crystals = make(data, name, layers)
    rows, held_out = torch.tensor([r for r in range(30) if r != 7]), torch.arange(30, 40)
    settings = data.settings(name)
    training = settings["training"]
    if name in OBJECTIVES:
        objective = OBJECTIVES[name](crystals, rows, held_out, settings["pretraining"], 0)
    else:
        objective = Regression(crystals, np.linspace(-1, 1, 40), rows, held_out, training)
    return loop.Trainer(
        network, objective, training, 4, 0, Fabric(accelerator="cpu", devices=1), data.root, "key"
    )


def test_each_process_drops_out_on_its_own(data, monkeypatch):
    trainer, seeds = trainer_of(data, "structure_only"), []
    monkeypatch.setattr(loop, "seed_step", lambda device, *parts: seeds.append(parts))
    for rank in (0, 1):
        monkeypatch.setattr(Fabric, "global_rank", property(lambda self, rank=rank: rank))
        trainer.advance(ROWS)
    assert seeds == [(0, "dropout", 0), (0, "dropout", 1, 1)]


class OnDevice(TorchDispatchMode):
    """Refuses values from the host, which a graph cannot take."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "lift_fresh" not in str(func), "a value comes from the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*MODELS, *OBJECTIVES, *LORA])
def test_nothing_in_a_step_waits_for_the_device(data, name, padded, monkeypatch):
    trainer = trainer_of(data, name, layers="all")
    crystals = trainer.objective.crystals
    for ragged in (crystals.nodes, crystals.edges, crystals.tokens):
        assert ragged is None or ragged.offsets_there is not None  # made before anything is recorded
    assert crystals.nodes is None or crystals._graphs
    if crystals.text_ids is not None:
        from castbench.kernels import cross_attention

        monkeypatch.setattr(cross_attention, "Reader", lambda kv, *_: lambda q: q + kv.sum())
    _, function, inputs = trainer.objective.padded_loss(trainer.network, ROWS, 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # values are not known: asking for one fails
        with OnDevice():
            function(*map(mode.from_tensor, inputs)).backward()
            with pytest.raises(AssertionError, match="from the host"):
                ROWS.new_tensor(3)
        with pytest.raises(Exception, match="local_scalar_dense"):
            mode.from_tensor(ROWS).sum().item()


def test_models_that_cannot_be_padded_are_not(data, monkeypatch):
    assert make(data, "crysmmnet_frozen")[0].takes_padded
    assert not make(data, "cast_lora")[0].takes_padded  # it reads all tokens
    network, crystals = make(data, "crysmmnet_lora")
    monkeypatch.setattr(dataset, "_on_gpu", lambda *_: True)
    assert network.takes_padded and not crystals.pads  # without kernels
    monkeypatch.setattr("castbench.kernels.usable", lambda name, device, kind: kind == torch.float32)
    assert not crystals.pads
    monkeypatch.setattr("castbench.kernels.usable", lambda *_: True)
    assert crystals.pads
    monkeypatch.setattr(text, "KERNEL_WIDTH", 3)
    assert not network.takes_padded
