import pytest
import torch

from castbench.models.batch import Batch, pad, segments, unpad


@pytest.mark.parametrize("lengths", [[3, 1, 4], [1], [2, 0, 2]])
@pytest.mark.parametrize("tail", [(), (5,), (2, 3)])
def test_pad_and_unpad_are_inverse_and_match_a_loop(lengths, tail):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed = torch.randn(sum(lengths), *tail)
    block, mask = pad(packed, offsets)
    assert block.shape == (len(lengths), max(lengths), *tail)
    for row, length in enumerate(lengths):
        assert torch.equal(block[row, :length], packed[offsets[row] : offsets[row + 1]])
        assert not block[row, length:].any()
        assert mask[row].tolist() == [i < length for i in range(max(lengths))]
    assert torch.equal(unpad(block, offsets), packed)


def test_segments_name_the_crystal_of_each_row():
    assert segments(torch.tensor([0, 2, 2, 5])).tolist() == [0, 0, 2, 2, 2]


def test_pad_passes_gradients_to_the_packed_rows():
    packed = torch.randn(4, 2, requires_grad=True)
    block, _ = pad(packed, torch.tensor([0, 1, 4]))
    unpad(block, torch.tensor([0, 1, 4])).square().sum().backward()
    assert torch.allclose(packed.grad, 2 * packed.detach())


def test_to_moves_tensors_and_keeps_absent_parts():
    batch = Batch(n=2, targets=torch.zeros(2)).to("meta")
    assert batch.n == 2 and batch.targets.device.type == "meta" and batch.token_ids is None
