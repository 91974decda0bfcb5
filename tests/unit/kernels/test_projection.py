import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="kernels take triton, which is not here")

from castbench.kernels import projection


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(37, 24, (16, 8)), (1, 8, (8,)), (130, 40, (3, 5, 8))])
def test_values_and_gradients_are_those_of_plain_torch(device, kind, sizes):
    projection.check(device, kind, *sizes)


def test_float32_is_nearly_as_exact_as_a_float32_product(device):
    """Relative to the output: what two parts of a weight leave out, and what sums of matrix units do."""
    torch.manual_seed(0)
    x = torch.randn(64, 768, device=device).bfloat16()
    layer = nn.Linear(768, 32, device=device)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    error = (projection.project(x, [layer], torch.float32) - exact).norm() / exact.norm()
    assert error < 2**-17


def test_the_check_notices_a_part_that_is_missing(device, monkeypatch):
    monkeypatch.setattr(projection, "PARTS", 1)
    with pytest.raises(RuntimeError, match="is off by"):
        projection.check(device, torch.float32, 20, 24, (16,))


def test_float32_products_of_states_that_learn_are_left_to_torch():
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    assert projection.fits(x, torch.float32)
    assert not projection.fits(x.float(), torch.float32)
    assert not projection.fits(x.requires_grad_(), torch.float32)
    assert projection.fits(x.float(), torch.bfloat16)
