import pytest
import torch

pytest.importorskip("triton", reason="kernels take triton, which is not here")

import triton
import triton.language as tl

from castbench.kernels import parts


@triton.jit
def _product(a, b, out, K: tl.constexpr, APART: tl.constexpr, PARTS: tl.constexpr):
    row, inner = tl.arange(0, 16), tl.arange(0, K)
    left = parts.split(tl.load(a + row[:, None] * K + inner[None, :]), b.dtype.element_ty, PARTS)
    right = parts.load_parts(b + row[None, :] * K + inner[:, None], None, APART, PARTS)
    total = tl.full((16, 16), 1.0, tl.float32)
    tl.store(out + row[:, None] * 16 + row[None, :], parts.dot_parts(left, right, total, PARTS))


@pytest.fixture
def values(device):
    return torch.randn(33, 50, generator=torch.Generator().manual_seed(0)).to(device)


def test_three_parts_are_the_number(values):
    values[0, :6] = torch.tensor([0.0, -1.0, 3e38, 1e-20, torch.pi, 1 + 2**-23])
    found = parts.parts_of(values, 3)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.double().unflatten(1, (3, -1)).sum(1), values.double())
    assert torch.equal(found[:, :50], values.bfloat16())


@pytest.mark.parametrize(("count", "error"), [(1, 2**-8), (2, 2**-16)])
def test_fewer_leave_out_little(values, count, error):
    found = parts.parts_of(values, count).double().unflatten(1, (count, -1)).sum(1)
    assert (found - values.double()).abs().le(error * values.abs()).all()


@pytest.mark.parametrize(("count", "error"), [(1, 2**-8), (2, 2**-16), (3, 2**-21)])
def test_products_are_as_exact_as_their_parts(device, count, error):
    a, b = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1)).to(device)
    out = torch.empty(16, 16, device=device)
    _product[(1,)](a, parts.parts_of(b.view(1, -1), count), out, 64, b.numel(), count)
    exact = a.double() @ b.double().T + 1
    assert (out - exact).norm() < error * exact.norm()
