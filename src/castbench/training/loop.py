"""The loop that trains every model: one protocol, resumable after any step.

A step is a function of the weights, the optimiser's moments and (seed, step): learning rate, data order,
masks and dropout have no state of their own (schedule.py). So a checkpoint after any step continues to the
same bits.

Chosen where the papers are silent: weight decay acts on weight matrices alone (not on biases, norms, LoRA);
the norm of the gradient is clipped at 1, so that no single batch throws a run off.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from castbench.models.base import Network
from castbench.training.checkpoint import read_checkpoint, write_checkpoint
from castbench.training.objectives import Objective
from castbench.training.schedule import epoch_batches, rate_factor, seed_step

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0
MAX_GRADIENT_NORM = 1.0
LINES = 10  # of progress in the log of a run
TERMINATED = 143  # 128 + SIGTERM: the job was stopped and can be started again
RATES = {"new": "learning_rate", "lora": "lora_learning_rate", "encoder": "encoder_learning_rate"}


@dataclass
class Failure:
    """Why a run stopped: a value that is not finite."""

    what: str
    step: int
    learning_rate: float
    rows: Tensor  # the crystals of the batch, or of validation


@dataclass
class Run:
    """What a run has come to, beside the network's weights and the optimiser's moments."""

    steps: int  # of an epoch
    total: int  # steps of the run
    losses: Tensor  # (steps,) float64, of the current epoch; on the device, so that no step waits for one
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int | None = None
    seconds: float = 0.0  # with validation, over all sessions
    failure: Failure | None = None


class Trainer:
    """One run of `network` on `objective`, whose state can be written and read after any step.

    Args:
        training: the section of the config (learning rates, weight decay, warm-up, cycles; where it has
            `patience`, the run stops early, after that many epochs without a better validation).
        epochs: length of the run.
        seed: of data order, masks and dropout.
        fabric: device and precision.
        folder: where checkpoints go.
        key: hash of all that the run is a function of; a checkpoint with another one is not continued.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        training: dict[str, Any],
        epochs: int,
        seed: int,
        fabric: Fabric,
        folder: Path,
        key: str,
    ):
        self.network, self.objective, self.training, self.epochs = network, objective, training, epochs
        self.seed, self.fabric, self.folder, self.key = seed, fabric, folder, key
        self.optimizer = make_optimizer(network, training)
        self.module, self.stepper = fabric.setup(network, self.optimizer)
        steps = math.ceil(len(objective.rows) / objective.batch_size)
        self.run = Run(steps, epochs * steps, torch.zeros(steps, dtype=torch.float64, device=fabric.device))

    def fit(self) -> Run:
        """Train to the end, see `steps`. On SIGTERM a checkpoint is written, and the process exits."""
        with terminable() as terminated:
            for _ in self.steps(terminated):
                pass
        return self.run

    def steps(self, terminated: threading.Event) -> Iterator[None]:
        """Train to the end from the newest checkpoint, and leave the network with its best weights.

        Yields after every step, so that several runs can take turns. Writes a checkpoint every
        `CHECKPOINT_SECONDS` and at the end; where `terminated` is set, one at once, and raises SystemExit.
        """
        self.resume()
        run, size = self.run, len(self.objective.rows)
        bar = tqdm(
            total=self.epochs * size,
            initial=size * run.step // run.steps,
            desc=f"{self.folder.parent.parent.name}, seed {self.seed}",
            unit=" crystals",
            unit_scale=True,
            disable=None,  # off where standard error is no terminal
        )
        self.clock = self.saved = time.monotonic()
        with bar:
            for epoch in range(run.step // run.steps, self.epochs):
                if self.ended():
                    break
                order = epoch_batches(self.objective.rows, self.objective.batch_size, self.seed, epoch)
                self.module.train()
                for place in range(run.step % run.steps, run.steps):
                    loss = self.advance(order[place])
                    run.losses[place] = loss
                    if bar.update(len(order[place])):  # true when it was drawn
                        bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
                    if place + 1 < run.steps and self.due(terminated):
                        self.save(terminated)
                    if place + 1 < run.steps:
                        yield
                self.close_epoch(epoch, order)
                if run.failure:
                    return
                if self.ended() or self.due(terminated):
                    self.save(terminated)
                yield
        self.network.load_trained_state(run.best)
        self.module.eval()

    def ended(self) -> bool:
        """Whether all steps are taken, or validation has not improved for `patience` epochs."""
        run, patience = self.run, self.training.get("patience")
        if run.step == run.total:
            return True
        closed = run.step % run.steps == 0 and run.best_epoch is not None
        return bool(patience and closed and len(run.history) - 1 - (run.best_epoch or 0) >= patience)

    def advance(self, rows: Tensor) -> Tensor:
        """Take one optimiser step; the loss () stays on the device."""
        run = self.run
        factor = self.rate_factor(run.step)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        seed_step(self.fabric.device, self.seed, "dropout", run.step)
        loss = self.objective.loss(self.module, rows, run.step)
        self.fabric.backward(loss)
        self.fabric.clip_gradients(
            self.module, self.stepper, max_norm=MAX_GRADIENT_NORM, error_if_nonfinite=False
        )
        self.stepper.step()
        self.stepper.zero_grad()
        run.step += 1
        return loss.detach()

    def rate_factor(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        return rate_factor(step, self.run.total, self.training["warmup_steps"], self.training["cycles"])

    def close_epoch(self, epoch: int, order: tuple[Tensor, ...]) -> None:
        """Validate, record the epoch, and keep the weights if they are the best; or find the run failed."""
        run, objective = self.run, self.objective
        rate = self.training["learning_rate"] * self.rate_factor(run.step - 1)
        wrong = (~run.losses.isfinite()).nonzero().flatten().tolist()
        if wrong:
            step = epoch * run.steps + wrong[0]
            last = self.training["learning_rate"] * self.rate_factor(step)
            run.failure = Failure("training loss", step, last, order[wrong[0]])
            return
        self.module.eval()
        row = {
            "epoch": epoch,
            "step": run.step,
            "learning_rate": rate,
            "train_loss": float(run.losses.mean()),
        }
        row |= objective.validate(self.module)
        if not all(map(math.isfinite, row.values())):
            run.failure = Failure("validation loss", run.step - 1, rate, objective.validation)
            return
        if all(row[objective.selects] < earlier[objective.selects] for earlier in run.history):
            run.best = {name: value.clone() for name, value in self.network.trained_state().items()}
            run.best_epoch = epoch
        run.history.append(row)
        if (epoch + 1) * LINES // self.epochs > epoch * LINES // self.epochs:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
            log.info("epoch %d of %d: %s", epoch + 1, self.epochs, shown)

    def due(self, terminated: threading.Event) -> bool:
        """Whether it is time for a checkpoint."""
        return terminated.is_set() or time.monotonic() - self.saved >= CHECKPOINT_SECONDS

    def save(self, terminated: threading.Event) -> None:
        """Write a checkpoint; the last one holds the best weights alone. Exit if that was asked for."""
        run = self.run
        tensors = {f"best/{name}": value for name, value in run.best.items()}
        if not self.ended():
            tensors |= {f"network/{name}": value for name, value in self.network.trained_state().items()}
            for index, moments in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
            tensors["losses"] = run.losses
        now = time.monotonic()
        run.seconds, self.clock, self.saved = run.seconds + now - self.clock, now, now
        own = {name: getattr(run, name) for name in ("step", "history", "best_epoch", "seconds")}
        write_checkpoint(self.folder, run.step, tensors, own | {"key": self.key})
        if terminated.is_set():
            log.warning(
                "stopped by SIGTERM after step %d of %d; start again to continue", run.step, run.total
            )
            raise SystemExit(TERMINATED)

    def resume(self) -> None:
        """Continue from the newest checkpoint of this very run, if there is one."""
        found = read_checkpoint(self.folder, self.key)
        if found is None:
            return
        tensors, own = found
        run = self.run
        for name in ("step", "history", "best_epoch", "seconds"):
            setattr(run, name, own[name])
        parts: dict[str, dict[str, Tensor]] = {"best": {}, "network": {}, "optimizer": {}, "losses": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = value.to(self.fabric.device)
        run.best = parts["best"]
        if not self.ended():
            run.losses = parts["losses"][""]
            self.network.load_trained_state(parts["network"])
            moments: dict[int, dict[str, Tensor]] = {}
            for name, value in parts["optimizer"].items():
                index, _, kind = name.partition("/")
                moments.setdefault(int(index), {})[kind] = value
            state = {"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]}
            self.optimizer.load_state_dict(state)
        log.info("continuing after step %d of %d", run.step, run.total)


def make_optimizer(network: Network, training: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW; each group of parameters has its `peak` rate, and its matrices decay, those of LoRA excepted."""
    decay, kinds = training["weight_decay"], []
    for name, parameters in network.parameter_groups().items():
        if not parameters:
            continue
        peak = training[RATES[name]]
        matrices = [p for p in parameters if p.ndim > 1 and name != "lora"]
        others = [p for p in parameters if p.ndim <= 1 or name == "lora"]
        kinds += [(matrices, peak, decay), (others, peak, 0.0)]
    return torch.optim.AdamW(
        [{"params": ps, "lr": peak, "peak": peak, "weight_decay": wd} for ps, peak, wd in kinds if ps],
        fused=True,
    )


@contextmanager
def terminable() -> Iterator[threading.Event]:
    """An event that SIGTERM sets while the block runs."""
    terminated = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)
