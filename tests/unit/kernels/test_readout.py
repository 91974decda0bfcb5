"""Crystal vectors and their gradients."""

import pytest
import torch

from castbench.kernels import readout

SIZES = [1, 0, 16, 17, 40, 3, 90]  # nodes; the last crystal pads


def example(device, width, kind, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    n = sum(sizes)
    shares = torch.rand(n, generator=generator)
    shares[n - sizes[-1] :] = 0
    nodes = torch.randn(n, width, generator=generator).to(device, kind).requires_grad_()
    return nodes, shares.to(device), torch.tensor([0, *sizes], device=device).cumsum(0)


def plain(nodes, shares, offsets):
    """In double precision."""
    rows, shares = nodes.double(), shares.double()
    parts = [slice(*pair) for pair in zip(offsets[:-2].tolist(), offsets[1:-1].tolist(), strict=True)]
    return torch.stack([(shares[part, None] * rows[part]).sum(0) for part in parts])


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [SIZES, [5, 1], [0, 40]])
def test_values_and_gradients_are_those_of_double_precision(device, width, kind, sizes):
    nodes, shares, offsets = example(device, width, kind, sizes)
    found, wanted = readout.readout(nodes, shares, offsets), plain(nodes, shares, offsets)
    assert found.dtype == torch.float32 and found.shape == (len(sizes) - 1, width)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn(width, len(sizes) - 1, device=device).T  # not contiguous
    (of_found,) = torch.autograd.grad((found * weights).sum(), nodes)
    (of_wanted,) = torch.autograd.grad((wanted * weights).sum(), nodes)
    assert of_found.dtype == kind and not of_found[offsets[-2] :].any()
    torch.testing.assert_close(of_found, of_wanted, rtol=2**-7 if kind == torch.bfloat16 else 1e-6, atol=1e-6)


def test_the_bits_are_the_same_each_time(device):
    values = example(device, 24, torch.float32)
    assert torch.equal(readout.readout(*values), readout.readout(*values))


def test_nodes_that_pad_count_for_nothing(device):
    nodes, shares, offsets = example(device, 16, torch.float32)
    changed = nodes.detach().clone()
    changed[offsets[-2] :] = torch.nan
    assert torch.equal(readout.readout(changed, shares, offsets), readout.readout(nodes, shares, offsets))


def test_the_check_of_a_device_passes_and_finds_a_difference(device, monkeypatch):
    with torch.no_grad():  # as in validation
        readout.check(device, torch.float32)
    monkeypatch.setattr(readout, "segment_sums", lambda *of: torch.zeros(5, 100, device=device))
    with pytest.raises(AssertionError):
        readout.check(device, torch.float32)
