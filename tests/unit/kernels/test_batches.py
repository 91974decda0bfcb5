"""The kernels that make padded batches."""

import pytest
import torch

from castbench.kernels import batches


@pytest.fixture
def crystals(device, monkeypatch):
    """Graphs, and offsets and states of tokens; in small blocks, of which the interpreter needs few."""
    for name, value in {"BLOCK": 128, "PIECES": 2, "TOKEN_BLOCK": 1024, "TOKEN_PIECES": 2}.items():
        monkeypatch.setattr(batches, name, value)
    held = batches.example(device, torch.Generator().manual_seed(1))
    nodes, edges = (offsets.diff() for offsets in held[0][:2])
    assert (nodes == 0).any() and ((nodes > 0) & (edges == 0)).any()  # the cases that matter are there
    assert nodes[-1] > 2 * batches.BLOCK and edges[-1] > 2 * batches.BLOCK * batches.PIECES
    return held


def sizes(crystals, rows, more):
    """Nodes, edges and tokens of the crystals, and so many more."""
    offsets = crystals[0].node_offsets, crystals[0].edge_offsets, crystals[1]
    return [int(part.diff()[rows].sum()) + more for part in offsets]


@pytest.mark.parametrize("more", [1, 300, 2000])
def test_every_bit_is_that_of_torch(crystals, device, more):
    generator = torch.Generator().manual_seed(more)
    nodes, edges = (offsets.diff().cpu() for offsets in crystals[0][:2])
    empty = (nodes == 0).nonzero()[:1, 0]
    without_edges = ((nodes > 0) & (edges == 0)).nonzero()[:1, 0]
    for rows in (
        torch.tensor([39]),
        torch.tensor([0]),
        without_edges,
        empty,
        torch.cat([empty, empty, without_edges]),
        torch.tensor([5, 5, 39, 5, 39]),
        *(torch.randint(0, 40, (n,), generator=generator) for n in (2, 3, 7, 33)),
        torch.randperm(40, generator=generator),
    ):
        rows = rows.to(device)
        batches.compare(*crystals, rows, *sizes(crystals, rows, more))


def test_a_difference_is_found(crystals, device, monkeypatch):
    rows = torch.tensor([3, 4], device=device)
    plain = batches.plain_graphs
    monkeypatch.setattr(
        batches, "plain_graphs", lambda *of: plain(*of) | {"shares": plain(*of)["shares"] + 1}
    )
    with pytest.raises(AssertionError, match="shares"):
        batches.compare(*crystals, rows, *sizes(crystals, rows, 4))


def test_the_check_of_a_device_passes(device):
    batches.check(device, torch.float32)


def test_states_of_float32_are_copied_too(crystals, device):
    graphs, offsets, states = crystals
    rows = torch.tensor([7, 2, 39], device=device)
    batches.compare(graphs, offsets, states.float(), rows, *sizes(crystals, rows, 10))


def test_ids_of_tokens_are_copied_too(crystals, device):
    _, offsets, states = crystals
    ids = (1000 * states[:, 0].float()).int()
    offsets = torch.cat([offsets, offsets[-1:]])  # behind the crystals one without tokens
    rows = torch.tensor([40, 40, 7, 2, 39], device=device)
    for more in (0, 10):
        size = int(offsets.diff()[rows].sum()) + more
        for found, wanted in zip(
            batches.tokens(offsets, ids, rows, size),
            batches.plain_tokens(offsets, ids, rows, size),
            strict=True,
        ):
            assert torch.equal(found, wanted)
