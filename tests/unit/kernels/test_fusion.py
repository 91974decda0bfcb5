from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="kernels take triton, which is not here")

from castbench import kernels
from castbench.kernels import fusion
from castbench.models.batch import Batch, Sizes
from castbench.models.cross_attention import Fusion

SIZES = {  # nodes, width of a state, of attention, of the feed-forward block, layers
    "a tail": (21, 16, 32, 64, 2),
    "a node": (1, 32, 16, 16, 1),
    "whole tiles, chunks": (32, 16, 128, 128, 3),
}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_are_those_of_plain_torch(device, kind, sizes):
    fusion.check(device, kind, *sizes)


def test_the_check_notices_gradients_of_another_vector(device, monkeypatch):
    parts = fusion._Step.parts

    def swapped(self, matrices, vectors):
        found = parts(self, matrices, vectors)
        return [*found[:4], found[5], found[4], *found[6:]]

    monkeypatch.setattr(fusion._Step, "parts", swapped)
    with pytest.raises(RuntimeError, match="is off by"):
        fusion.check(device, torch.float32, *SIZES["a tail"])


@pytest.fixture
def padded(device):
    """Nodes, tokens and their padded batch: three crystals, one that pads."""
    drawn = torch.Generator().manual_seed(1)
    sizes = Sizes(crystals=3, nodes=19, tokens=40, most_nodes=7, most_tokens=15)
    node_offsets, token_offsets = torch.tensor([0, 4, 5, 12, 19]), torch.tensor([0, 9, 24, 25, 40])
    offsets = {"node_offsets": node_offsets.to(device), "token_offsets": token_offsets.to(device)}
    nodes, tokens = torch.randn(19, 16, generator=drawn), torch.randn(40, 24, generator=drawn).bfloat16()
    return nodes.to(device).requires_grad_(), tokens.to(device), Batch(n=4, **offsets, sizes=sizes)


@pytest.fixture
def make(device):
    def make(dropout=0.0, **changed):
        torch.manual_seed(2)
        sizes = {"layers": 2, "heads": 4, "width": 32, "feedforward": 64} | changed
        return Fusion(16, 24, **sizes, dropout=dropout).to(device)

    return make


@pytest.fixture
def calls(monkeypatch):
    """Kernels are used on a CPU too; their calls are counted."""
    calls, fuse = [], fusion.fuse
    monkeypatch.setattr(kernels, "usable", lambda name, *_: name != "cross_attention")
    monkeypatch.setattr(fusion, "fuse", lambda *args: (calls.append(1), fuse(*args))[1])
    return calls


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fusion_is_the_same_with_kernels(padded, make, calls, monkeypatch, device, precision):
    nodes, tokens, batch = padded
    network, found = make(), []
    for usable in (lambda *_: False, lambda name, *_: name != "cross_attention"):
        monkeypatch.setattr(kernels, "usable", usable)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            value = network(nodes, tokens, batch)
        real = value[:12].cos().sum()
        gradients = torch.autograd.grad(real, [nodes, *network.parameters()])
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        found.append([value[:12], *gradients])
    assert calls == [1]
    names = ["value", "nodes", *(name for name, _ in network.named_parameters())]
    for name, plain, fused in zip(names, *found, strict=True):
        if "key.bias" in name:  # the softmax takes it away: rounding alone
            continue
        limit = {"32-true": 2**-15, "bf16-mixed": 0.05}[precision]
        assert (plain - fused).norm() <= limit * plain.norm(), name


def test_a_second_backward_pass_gives_the_same_bits(padded, make, calls):
    nodes, tokens, batch = padded
    network = make()
    loss = network(nodes, tokens, batch)[:12].cos().sum()
    gradients = partial(torch.autograd.grad, loss, [nodes, *network.parameters()], retain_graph=True)
    assert all(map(torch.equal, gradients(), gradients()))


def test_gradients_of_some_alone_are_those_of_all(padded, make, calls):
    nodes, tokens, batch = padded
    network = make()
    network[0].requires_grad_(False)
    loss = network(nodes, tokens, batch)[:12].cos().sum()
    wanted = [p for p in network.parameters() if p.requires_grad]
    every = torch.autograd.grad(loss, wanted, retain_graph=True)
    (one,) = torch.autograd.grad(loss, [network[1].feedforward[1].weight], retain_graph=True)
    assert torch.equal(one, every[-4])


def test_dropout_and_odd_widths_take_the_plain_way(padded, make, calls):
    nodes, tokens, batch = padded
    with torch.no_grad():
        make(dropout=0.1).train()(nodes, tokens, batch)
        make(feedforward=24)(nodes, tokens, batch)
        assert calls == []
        make(dropout=0.1).eval()(nodes, tokens, batch)
        assert calls == [1]


@pytest.mark.parametrize(
    ("room", "parts", "chunk"),
    [(227, 1, 128), (227, 2, 64), (163, 1, 128), (163, 2, 64), (99, 1, 64), (99, 2, 32)],
)
def test_as_many_columns_pass_through_as_a_gpu_has_room_for(monkeypatch, room, parts, chunk):
    properties = SimpleNamespace(shared_memory_per_block_optin=room * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert fusion._chunk(128, parts, torch.device("cuda")) == chunk
