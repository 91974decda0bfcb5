"""The loop that trains every model: one protocol, resumable after any step.

A step is a function of the weights, the optimiser's moments and (seed, step): learning rate, data order,
masks and dropout have no state of their own (schedule.py). So a checkpoint after any step continues to the
same bits.
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
from torch import Tensor, distributed
from tqdm import tqdm

from castbench.errors import InputError
from castbench.models.base import Network
from castbench.training.checkpoint import read_checkpoint, write_checkpoint
from castbench.training.objectives import Objective
from castbench.training.optimizer import MAX_GRADIENT_NORM, clip_gradients, make_optimizer
from castbench.training.recorder import Recorder
from castbench.training.schedule import epoch_batches, rate_factor, seed_step
from castbench.training.session import describe_session, peak_memory
from castbench.training.share import Share

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0
KEPT = ("step", "history", "best_epoch", "seconds", "peak_memory_mb", "hardware")  # of a run, as JSON
LINES = 10  # of progress in the log of a run
TERMINATED = 143  # 128 + SIGTERM: the job was stopped and can be started again


@dataclass
class Failure:
    """Why a run stopped: something that is not finite."""

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
    seconds: float = 0.0  # with validation, over all sessions; without the turns of other runs
    peak_memory_mb: float = 0.0  # the largest of all sessions
    hardware: dict[str, Any] = field(default_factory=dict)  # of the last session
    failure: Failure | None = None


class Trainer:
    """One run of `network` on `objective`, whose state can be written and read after any step.

    Several processes (`fabric.world_size`) share every batch, and the first of them writes.

    Args:
        training: the section of the config (learning rates, weight decay, warm-up, cycles; where it has
            `patience`, the run stops early, after that many epochs without a better validation; with
            `selection` "last" the weights are those of the last epoch, and validation decides nothing).
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
        self.optimizer = make_optimizer(network.to(fabric.device), training, fabric.device)
        self.module, self.stepper = fabric.setup(network, self.optimizer)
        objective.share = Share(fabric.global_rank, fabric.world_size)
        flash = fabric.device.type == "cuda" and training.get("precision", "32-true") != "32-true"
        if flash and network.text_mode == "lora":
            # Where it only warns, flash attention adds up its gradients in any order.
            torch.use_deterministic_algorithms(True)
        self.recorder = None
        if objective.pads and fabric.world_size == 1:
            self.recorder = objective.recorder = Recorder(fabric.device, self.changing)
        # On the hosts, so that no GPU waits when the processes agree on something.
        self.hosts = distributed.new_group(backend="gloo") if fabric.world_size > 1 else None
        self.meant = 0  # losses of the epoch that are the processes' mean already
        self.stopping = False  # SIGTERM came, to whichever process
        steps = math.ceil(len(objective.rows) / objective.batch_size)
        self.run = Run(steps, epochs * steps, torch.zeros(steps, dtype=torch.float64, device=fabric.device))

    def fit(self) -> None:
        """Train to the end, see `steps`. On SIGTERM a checkpoint is written, and the process exits."""
        with terminable() as terminated:
            for _ in self.steps(terminated):
                pass

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
            disable=None if self.fabric.is_global_zero else True,  # off where standard error is no terminal
        )
        if self.fabric.device.type == "cuda":  # runs side by side have one peak all the same
            torch.cuda.reset_peak_memory_stats(self.fabric.device)
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
                        self.save()
                    if place + 1 < run.steps:
                        yield from self.turn_of_others()
                self.close_epoch(epoch, order)
                if run.failure:
                    self.account()
                    return
                if self.due(terminated) or self.ended():
                    self.save()
                yield from self.turn_of_others()
        self.network.load_trained_state(run.best)
        self.module.eval()

    def turn_of_others(self) -> Iterator[None]:
        """Let other runs take a step, whose time is not this one's."""
        since = time.monotonic()
        yield
        self.clock += time.monotonic() - since

    def account(self) -> None:
        """Add up what the run has cost so far."""
        run, now = self.run, time.monotonic()
        run.seconds, self.clock = run.seconds + now - self.clock, now
        run.peak_memory_mb = max(run.peak_memory_mb, peak_memory(self.fabric))
        run.hardware = describe_session(self.fabric)

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
            if isinstance(group["lr"], Tensor):  # in its place, where recorded steps read it
                group["lr"].fill_(factor * group["peak"])
            else:
                group["lr"] = factor * group["peak"]
        others = [self.fabric.global_rank] if self.fabric.global_rank else []  # each drops out on its own
        if self.recorder is not None:
            key, function, inputs = self.objective.padded_loss(self.module, rows, run.step)
            self.recorder.record(key, lambda *inputs: self.descend(function(*inputs)), *inputs)
        seed_step(self.fabric.device, self.seed, "dropout", run.step, *others)
        if self.recorder is None:
            loss = self.descend(self.objective.loss(self.module, rows, run.step))
        else:
            loss = self.recorder.replay(key, *inputs)
        run.step += 1
        return loss

    def descend(self, loss: Tensor) -> Tensor:
        """Take the optimiser's step on a loss (), and return it."""
        self.fabric.backward(loss)
        longest = self.training.get("max_gradient_norm", MAX_GRADIENT_NORM)
        clip_gradients(self.optimizer, longest)
        self.stepper.step()
        self.stepper.zero_grad()
        return loss.detach()

    def changing(self) -> Iterator[Tensor]:
        """All tensors that a step changes."""
        yield from self.network.trained_state().values()
        for moments in self.optimizer.state.values():
            yield from moments.values()

    def rate_factor(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        training, peak = self.training, self.training["learning_rate"]
        schedule, final = training.get("schedule", "cosine"), training.get("final_learning_rate", 0.0)
        return rate_factor(
            step, self.run.total, training["warmup_steps"], training["cycles"], schedule, final / peak
        )

    def close_epoch(self, epoch: int, order: tuple[Tensor, ...]) -> None:
        """Validate, record the epoch, and keep the weights if they are the best; or find the run failed."""
        run, objective = self.run, self.objective
        rate = self.training["learning_rate"] * self.rate_factor(run.step - 1)
        self.mean_losses(run.steps)
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
        if self.training.get("selection") == "last":
            better = run.step == run.total
        else:
            better = all(row[objective.selects] < earlier[objective.selects] for earlier in run.history)
        if better:
            weights = {name: value.clone() for name, value in self.network.trained_state().items()}
            if not torch.stack([value.isfinite().all() for value in weights.values()]).all():
                run.failure = Failure("a weight", run.step - 1, rate, order[-1])
                return
            run.best, run.best_epoch = weights, epoch
        run.history.append(row)
        if (epoch + 1) * LINES // self.epochs > epoch * LINES // self.epochs:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
            log.info("epoch %d of %d: %s", epoch + 1, self.epochs, shown)

    def mean_losses(self, end: int) -> None:
        """Make the new ones of the epoch's losses, up to `end`, the mean of all processes."""
        if self.hosts is not None and self.meant < end:
            losses = self.run.losses[self.meant : end]
            every: Any = self.fabric.all_gather(losses.clone())
            losses.copy_(every.mean(dim=0))
        self.meant = end % self.run.steps

    def due(self, terminated: threading.Event) -> bool:
        """Whether it is time for a checkpoint, in this process or another."""
        late = time.monotonic() - self.saved >= CHECKPOINT_SECONDS
        asked = torch.tensor([terminated.is_set(), late], dtype=torch.int32)
        if self.hosts is not None:
            distributed.all_reduce(asked, distributed.ReduceOp.MAX, group=self.hosts)
        self.stopping = bool(asked[0])
        return bool(asked.any())

    def save(self) -> None:
        """Write a checkpoint; the last one holds the best weights alone. Exit if that was asked for."""
        run = self.run
        if place := run.step % run.steps:
            self.mean_losses(place)
        self.account()
        self.saved = self.clock
        if self.fabric.is_global_zero:
            own = {name: getattr(run, name) for name in KEPT}
            write_checkpoint(self.folder, self.key, run.step, self.state(), own, self.ended())
        if self.stopping:
            self.fabric.barrier()
            log.warning(
                "stopped by SIGTERM after step %d of %d; start again to continue", run.step, run.total
            )
            raise SystemExit(TERMINATED)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint has to hold of tensors."""
        run = self.run
        tensors = {f"best/{name}": value for name, value in run.best.items()}
        if not self.ended():
            tensors |= {f"network/{name}": value for name, value in self.network.trained_state().items()}
            for index, moments in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
            tensors["losses"] = run.losses
        return tensors

    def resume(self) -> None:
        """Continue from the newest checkpoint of this very run, if there is one.

        Raises:
            InputError: other processes do not see it.
        """
        with self.fabric.rank_zero_first():  # it removes what is damaged
            found = read_checkpoint(self.folder, self.key)
        if self.hosts is not None:
            step = torch.tensor(found[1]["step"] if found else -1, device=self.fabric.device)
            steps: Any = self.fabric.all_gather(step)
            if (steps != step).any():
                raise InputError(
                    f"{self.folder}: not the same on all nodes; put results/ on a disk that all share"
                )
        if found is None:
            return
        tensors, own = found
        run = self.run
        for name in KEPT:
            setattr(run, name, own[name])
        parts: dict[str, dict[str, Tensor]] = {"best": {}, "network": {}, "optimizer": {}, "losses": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = value.to(self.fabric.device)
        run.best = parts["best"]
        if not self.ended():
            run.losses, self.meant = parts["losses"][""], run.step % run.steps
            self.network.load_trained_state(parts["network"])
            moments: dict[int, dict[str, Tensor]] = {}
            for name, value in parts["optimizer"].items():
                index, _, kind = name.partition("/")
                moments.setdefault(int(index), {})[kind] = value
            state = {"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]}
            self.optimizer.load_state_dict(state)
        log.info("continuing after step %d of %d", run.step, run.total)


@contextmanager
def terminable() -> Iterator[threading.Event]:
    """An event that SIGTERM sets while the block runs."""
    terminated = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)
