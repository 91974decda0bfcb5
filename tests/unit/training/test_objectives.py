import torch

from castbench.training.objectives import random_mask


def test_mask_has_a_node_of_each_crystal_and_the_right_share():
    sizes = torch.tensor([1, 2, 3, 50, 1] * 200)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    mask = random_mask(offsets, 0.5, 1, "train", 2)
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert mask[first:last].any()
    large = torch.repeat_interleave(sizes == 50, sizes)
    assert abs(mask[large].float().mean() - 0.5) < 0.03


def test_mask_of_tiny_probability_hides_one_node_a_crystal():
    offsets = torch.arange(0, 101, 10)
    assert random_mask(offsets, 1e-9, 0).view(10, 10).sum(dim=1).tolist() == [1] * 10


def test_mask_is_a_function_of_its_stream():
    offsets = torch.tensor([0, 300])
    first = random_mask(offsets, 0.5, 1, "train", 2)
    torch.rand(3)
    assert torch.equal(random_mask(offsets, 0.5, 1, "train", 2), first)
    assert not torch.equal(random_mask(offsets, 0.5, 1, "train", 3), first)
