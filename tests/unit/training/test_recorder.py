"""Recorded steps on a GPU; skipped without one."""

from itertools import product

import numpy as np
import pytest
import torch

from castbench.models import build_model
from castbench.training import loop
from castbench.training.dataset import Crystals
from castbench.training.objectives import Regression
from castbench.training.recorder import Recorder
from castbench.training.session import make_fabric

LORA = [  # model, precision, layers that LoRA adapts
    ("text_only", "32-true", "all"),
    ("text_only", "bf16-mixed", "all"),
    ("crysmmnet_lora", "32-true", 1),
    ("crysmmnet_lora", "bf16-mixed", 1),
]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="recording takes a GPU")


class Unrecorded(Recorder):
    """Runs what would be replayed."""

    def record(self, key, function, *inputs):
        self.graphs[key] = function

    def replay(self, key, *inputs):
        return self.graphs[key](*(value.to(self.device) for value in inputs))


def trained(data, name, folder, steps, precision="32-true", layers=1, recorded=True):
    """Parameters after some steps from the state in `folder`, and the trainer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    settings = data.settings(name, precision=precision)
    architecture = settings["architecture"]
    architecture = architecture | {"lora": architecture["lora"] | {"layers": layers}}
    network = build_model(name, architecture, data.root / "encoder")
    fabric = make_fabric("cuda", precision, devices=1)
    paths = {key: path for key, path in data.caches(name).items() if key != "encoder"}
    crystals = Crystals(network, **paths, device=fabric.device)
    rows = torch.tensor([row for row in range(30) if row != 7])
    training = settings["training"]
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
    ("name", "precision", "layers"),
    [*product(("structure_only", "crysmmnet_frozen", "cast_scratch"), ("32-true", "bf16-mixed"), [1]), *LORA],
)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(data, name, precision, layers, tmp_path):
    whole, _ = trained(data, name, tmp_path / "whole", 30, precision, layers)
    _, trainer = trained(data, name, tmp_path / "broken", 13, precision, layers)
    assert trainer.recorder is not None
    trainer.clock = trainer.saved = 0.0
    trainer.save()
    resumed, _ = trained(data, name, tmp_path / "broken", 30, precision, layers)
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


@pytest.mark.parametrize(("name", "precision", "layers"), LORA)
def test_replayed_steps_and_predictions_with_lora_are_those_of_the_operations(
    data, name, precision, layers, tmp_path, monkeypatch
):
    """With dropout, whose random numbers are the same."""
    losses, predicted, rows = [], [], torch.arange(30, 40)
    for recorder in (Recorder, Unrecorded):
        monkeypatch.setattr(loop, "Recorder", recorder)
        _, trainer = trained(data, name, tmp_path, 4, precision, layers)  # an epoch
        trainer.module.eval()
        predicted.append(trainer.objective.predict(trainer.module, rows))
        assert type(trainer.recorder) is recorder
        losses.append(trainer.run.losses.tolist())
    tolerance = 1e-3 if precision == "32-true" else 2e-2
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    np.testing.assert_allclose(*predicted, rtol=tolerance, atol=tolerance)


def test_the_first_recorded_loss_with_lora_is_that_of_unpadded_texts(data, tmp_path):
    """In float32: flash attention takes no heads as narrow as the fixture's. At first, LoRA adds nothing."""
    losses = []
    for recorded in (True, False):
        _, trainer = trained(data, "text_only", tmp_path, 1, layers="all", recorded=recorded)
        losses.append(float(trainer.run.losses[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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
