"""Recorded steps on a GPU; skipped without one."""

from itertools import product

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from castbench.models import build_model
from castbench.training import loop
from castbench.training.dataset import Crystals
from castbench.training.objectives import Regression

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="recording takes a GPU")


def trained(data, name, folder, steps, precision="32-true", recorded=True):
    """Parameters after some steps from the state in `folder`, and the trainer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    network = build_model(name, data.settings(name)["architecture"], data.root / "encoder")
    fabric = Fabric(accelerator="cuda", devices=1, precision=precision)
    paths = {key: path for key, path in data.caches(name).items() if key != "encoder"}
    crystals = Crystals(network, **paths, device=fabric.device)
    rows = torch.tensor([row for row in range(30) if row != 7])
    training = data.settings(name)["training"]
    objective = Regression(crystals, np.linspace(-1, 1, 40), rows, torch.arange(30, 40), training)
    trainer = loop.Trainer(network, objective, training, 10, 0, fabric, folder, "key")
    if not recorded:
        trainer.recorder = None
    trainer.resume()
    trainer.module.train()
    generator = torch.Generator().manual_seed(0)
    batches = [rows[torch.randperm(len(rows), generator=generator)[:8]] for _ in range(100)]
    while trainer.run.step < steps:
        step = trainer.run.step
        trainer.run.losses[step % trainer.run.steps] = trainer.advance(batches[step])
    return {key: value.clone() for key, value in network.trained_state().items()}, trainer


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *product(("structure_only", "crysmmnet_frozen", "cast_scratch"), ("32-true", "bf16-mixed")),
        ("crysmmnet_lora", "32-true"),  # flash attention takes no heads as narrow as the fixture's
    ],
)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(data, name, precision, tmp_path):
    whole, _ = trained(data, name, tmp_path / "whole", 30, precision)
    _, trainer = trained(data, name, tmp_path / "broken", 13, precision)
    trainer.clock = trainer.saved = 0.0
    trainer.save()
    resumed, _ = trained(data, name, tmp_path / "broken", 30, precision)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.parametrize("name", ["structure_only", "cast_scratch"])
def test_recorded_steps_are_those_that_are_not(data, name, tmp_path):
    losses = []
    for recorded in (True, False):
        _, trainer = trained(data, name, tmp_path, 4, recorded=recorded)  # an epoch
        assert (trainer.recorder is not None) is recorded
        losses.append(trainer.run.losses.tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)


def test_recording_changes_nothing(data, tmp_path):
    before, trainer = trained(data, "structure_only", tmp_path, 0)
    function = trainer.objective.padded_loss(trainer.module, torch.arange(4), 0)[1]
    trainer.recorder.record("key", lambda rows: trainer.descend(function(rows)), torch.arange(4))
    after = trainer.network.trained_state()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(float(moments["step"]) == 0 for moments in trainer.optimizer.state.values())


def test_recorded_predictions_are_those_that_are_not(data, tmp_path):
    _, trainer = trained(data, "cast_scratch", tmp_path, 3)
    trainer.module.eval()
    objective, rows = trainer.objective, torch.arange(30, 40)
    recorded = objective.predict(trainer.module, rows)
    objective.recorder = None
    np.testing.assert_array_equal(objective.predict(trainer.module, rows), recorded)
