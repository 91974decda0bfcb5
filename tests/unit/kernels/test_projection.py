import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="kernels take triton, which is not here")

from castbench.kernels import projection


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(37, 24, (16, 8)), (1, 8, (8,)), (130, 40, (3, 5, 8))])
def test_values_and_gradients_are_those_of_plain_torch(device, kind, sizes):
    projection.check(device, kind, *sizes)


def test_three_parts_are_the_number(device):
    values = torch.randn(33, 50, generator=torch.Generator().manual_seed(0)).to(device)
    values[0, :6] = torch.tensor([0.0, -1.0, 3e38, 1e-20, torch.pi, 1 + 2**-23])
    parts = projection.thirds(values)
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.double().unflatten(1, (3, -1)).sum(1), values.double())


def test_float32_is_about_as_exact_as_a_float32_product(device):
    torch.manual_seed(0)
    x = torch.randn(64, 768, device=device).bfloat16()
    layer = nn.Linear(768, 32, device=device)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    errors = [
        (value - exact).norm() for value in (projection.project(x, [layer], torch.float32), layer(x.float()))
    ]
    assert errors[0] <= 10 * errors[1]


def test_the_check_notices_a_third_that_is_missing(device, monkeypatch):
    thirds = projection.thirds
    monkeypatch.setattr(projection, "thirds", lambda values: _without_second(thirds(values)))
    with pytest.raises(RuntimeError, match="is off by"):
        projection.check(device, torch.float32, 20, 24, (16,))


def _without_second(parts):
    columns = parts.shape[1] // 3
    parts[:, columns : 2 * columns] = 0
    return parts


def test_float32_products_of_states_that_learn_are_left_to_torch():
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    assert projection.fits(x, torch.float32)
    assert not projection.fits(x.float(), torch.float32)
    assert not projection.fits(x.requires_grad_(), torch.float32)
    assert projection.fits(x.float(), torch.bfloat16)
