from itertools import pairwise

import pytest
import torch

from castbench.training.schedule import (
    batches,
    epoch_batches,
    rate_factor,
    seed_step,
    stateless_seed,
    warmup_length,
)


def test_warm_up_is_at_most_a_tenth_of_the_run():
    assert warmup_length(100_000, 1000) == 1000
    assert warmup_length(200, 1000) == 20
    assert warmup_length(5, 1000) == 0


def test_rate_rises_to_the_peak_and_falls_towards_zero():
    factors = [rate_factor(step, 1000, 50, 1) for step in range(1000)]
    assert factors[:50] == pytest.approx([(i + 1) / 50 for i in range(50)])
    assert factors[50] == 1.0
    assert all(a > b for a, b in pairwise(factors[50:]))
    assert factors[525] == pytest.approx(0.5, abs=1e-12)
    assert 0 < factors[-1] < 1e-4


def test_cosine_restarts_with_every_cycle():
    factors = [rate_factor(step, 310, 10, 3) for step in range(310)]
    assert [step for step, factor in enumerate(factors) if factor == 1.0] == [9, 10, 110, 210]
    assert factors[10:110] == pytest.approx(factors[110:210])


def test_a_linear_schedule_ends_at_its_final_rate():
    """coGN on Matbench: from 5e-4 straight to 1e-5 (Keras' polynomial decay of power 1), without warm-up."""
    rates = [5e-4 * rate_factor(step, 800, 0, 1, "linear", 1e-5 / 5e-4) for step in range(800)]
    assert rates == pytest.approx([(5e-4 - 1e-5) * (1 - step / 800) + 1e-5 for step in range(800)])
    assert rate_factor(4, 100, 10, 1, "linear") == 0.5
    assert rate_factor(55, 100, 10, 1, "linear") == 0.5


def test_a_run_of_one_step_has_a_rate():
    assert rate_factor(0, 1, 1000, 1) == 1.0


def test_order_is_a_function_of_seed_and_epoch():
    rows = torch.arange(100, 200)
    first = torch.cat(epoch_batches(rows, 16, seed=3, epoch=5))
    torch.manual_seed(9)
    assert torch.equal(torch.cat(epoch_batches(rows, 16, seed=3, epoch=5)), first)
    assert not torch.equal(torch.cat(epoch_batches(rows, 16, seed=3, epoch=6)), first)
    assert not torch.equal(torch.cat(epoch_batches(rows, 16, seed=4, epoch=5)), first)
    assert torch.equal(first.sort().values, rows)


@pytest.mark.parametrize(
    ("n", "size", "sizes"), [(65, 64, [33, 32]), (3, 360, [3]), (8, 4, [4, 4]), (1, 1, [1])]
)
def test_batches_are_even_and_drop_nothing(n, size, sizes):
    parts = batches(torch.arange(n), size)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), torch.arange(n))


def test_dropout_follows_from_the_step_alone():
    def dropped(step):
        seed_step(torch.device("cpu"), 1, "dropout", step)
        return torch.nn.functional.dropout(torch.ones(64))

    first = dropped(7)
    torch.rand(5)
    assert torch.equal(dropped(7), first)
    assert not torch.equal(dropped(8), first)
    assert stateless_seed(1, "order", 2) != stateless_seed(12, "order", 0)
