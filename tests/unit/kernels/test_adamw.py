"""AdamW by kernels against torch's."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="kernels take triton, which is not here")

from castbench.kernels import adamw
from castbench.training.optimizer import FlatAdamW, clip_gradients


def test_steps_are_those_of_torch(device):
    adamw.check(device, torch.float32)


def make(device, network):
    """Two groups with different rates and decays."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    return [
        {"params": part, "lr": torch.tensor(rate, device=device), "weight_decay": decay}
        for part, rate, decay in ((matrices, 1e-2, 0.1), (others, 3e-3, 0.0))
    ]


def take(optimizer, network, x, longest):
    optimizer.zero_grad()
    network(x).square().mean().backward()
    clip_gradients(optimizer, longest)
    optimizer.step()


@pytest.mark.parametrize("longest", [None, 0.1])
def test_parameters_of_any_size_take_the_same_steps(device, longest):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(33, 80), nn.SiLU(), nn.Linear(80, 1)).to(device)
    theirs = copy.deepcopy(ours)
    x = torch.randn(9, 33, device=device)
    flat = FlatAdamW(make(device, ours))
    plain = torch.optim.AdamW(make(device, theirs))
    for step in range(5):
        for optimizer, network in ((flat, ours), (plain, theirs)):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (step + 1))
            take(optimizer, network, x, longest)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one.data_ptr() % 16 == 0
        for name, value in plain.state[other].items():
            torch.testing.assert_close(flat.state[one][name], value.to(device), rtol=1e-5, atol=1e-7)


def test_a_loaded_state_goes_on_to_the_same_bits(device):
    torch.manual_seed(0)
    ours = nn.Linear(33, 3).to(device)
    x = torch.randn(9, 33, device=device)
    first = FlatAdamW(make(device, ours))
    for _ in range(3):
        take(first, ours, x, 1.0)
    kept, values = copy.deepcopy(first.state_dict()), copy.deepcopy(ours.state_dict())
    for _ in range(2):
        take(first, ours, x, 1.0)
    other = nn.Linear(33, 3).to(device)
    second = FlatAdamW(make(device, other))
    other.load_state_dict(values)
    second.load_state_dict(kept)
    for _ in range(2):
        take(second, other, x, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))
