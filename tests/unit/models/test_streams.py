from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from castbench.models.streams import beside
from castbench.training.recorder import Recorder
from castbench.training.turns import take_turns

ON_GPU = torch.cuda.is_available()


def step(layers, token_states, others, aside):
    """A loss whose gradients come from products beside a chain of small operations, or behind it."""
    if aside:
        with beside(token_states) as join:
            read = nn.functional.linear(token_states, layers[0].weight, layers[0].bias)
    h = others
    for layer in layers[1:]:
        h = layer(h).tanh()
    if aside:
        join()
    else:
        read = nn.functional.linear(token_states, layers[0].weight, layers[0].bias)
    return (h @ read.T).softmax(1).square().sum()


@pytest.fixture
def problem():
    torch.manual_seed(0)
    device = "cuda" if ON_GPU else "cpu"
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(5)).to(device)
    return layers, torch.randn(3000, 64, device=device), torch.randn(200, 64, device=device)


def test_what_runs_beside_gives_the_same_bits(problem):
    layers, tokens, others = problem
    found = []
    for aside in (False, True, True):
        # A copy that nothing else holds, so that its memory is used again as soon as it may be.
        loss = step(layers, tokens.clone(), others, aside)
        found.append([loss, *torch.autograd.grad(loss, list(layers.parameters()))])
        torch.empty_like(tokens).fill_(torch.nan)
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize(("version", "streams"), [("2.11.0+cu130", 0), ("2.13.0", 2)])
def test_before_torch_2_13_runs_side_by_side_share_a_stream(monkeypatch, version, streams):
    """Recorded steps read their dropout's seed from one place there."""
    made = []
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.append(1))
    take_turns([iter([None]), iter([None])], 2, torch.device("cuda"))
    assert len(made) == streams


def test_of_runs_side_by_side_each_keeps_to_its_own_stream():
    read, streams = SimpleNamespace(is_cuda=True), []  # its stream cannot be taken

    def run():
        for _ in range(2):
            with beside(read) as join:
                streams.append(torch.cuda.current_stream() if ON_GPU else None)
            join()
            yield

    take_turns([run(), run()], 2, torch.device("cuda" if ON_GPU else "cpu"))
    assert len(streams) == 4 and streams[0] == streams[2] and streams[1] == streams[3]
    with pytest.raises((AttributeError, AssertionError)):
        take_turns([run()], 1, torch.device("cpu"))


@pytest.mark.skipif(not ON_GPU, reason="only a GPU records")
def test_it_can_be_recorded(problem):
    layers, tokens, others = problem
    places = [torch.zeros_like(parameter) for parameter in layers.parameters()]

    def recorded(tokens, others):
        loss = step(layers, tokens * 1, others, aside=True)
        for place, gradient in zip(places, torch.autograd.grad(loss, list(layers.parameters())), strict=True):
            place.copy_(gradient)
        return loss.detach()

    recorder = Recorder(tokens.device, lambda: places)
    for factor in (1, 2, 3):
        loss = recorder.run("a shape", recorded, factor * tokens, others)
        wanted = step(layers, factor * tokens, others, aside=False)
        assert torch.equal(loss, wanted.detach())
        gradients = torch.autograd.grad(wanted, list(layers.parameters()))
        assert all(map(torch.equal, places, gradients))
