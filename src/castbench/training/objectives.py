"""What a run minimises, and what it selects its weights by: regression of a target, and the pretrainings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench.evaluation import metrics
from castbench.models.base import Outcome
from castbench.models.batch import Batch, Sizes, segments
from castbench.training.dataset import Crystals
from castbench.training.recorder import Recorder
from castbench.training.schedule import batches, generator
from castbench.training.share import Share

ALONE = Share()
Work = tuple[Hashable, Callable[..., Tensor], tuple[Tensor, ...]]  # key, function, inputs of it on the host
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": functional.l1_loss,
    "huber": functional.huber_loss,
    "mse": functional.mse_loss,
}


class Objective(ABC):
    """What the training loop asks of a task.

    Attributes:
        columns: names of the values that `validate` returns.
        selects: the one of them whose least value selects the weights.
        share: the part of this process, where several train together; the `Trainer` says which.
        recorder: of a GPU where batches are padded; likewise.
    """

    columns: tuple[str, ...]
    selects: str
    share = ALONE
    recorder: Recorder | None = None
    pads = False  # whether `padded_loss` can be asked for

    def __init__(self, train: Tensor, validation: Tensor, batch_size: int):
        self.rows, self.validation, self.batch_size = train, validation, batch_size

    @abstractmethod
    def loss(self, network: nn.Module, rows: Tensor, step: int) -> Tensor:
        """Mean loss () over the crystals or compositions `rows` (B,) at a step of the run.

        Of several processes each returns its part, such that their mean is that loss.
        """

    def padded_loss(self, network: nn.Module, rows: Tensor, step: int) -> Work:
        """The loss of a batch as a function that can be recorded, of what a step of its shape depends on."""
        raise NotImplementedError

    @abstractmethod
    def validate(self, network: nn.Module) -> dict[str, float]:
        """Values of `columns` on the validation part; one that is not defined there may be absent."""


class Regression(Objective):
    """A loss on standardised targets; selection by the mean absolute error on validation, where there is one.

    `values` (G,) are in the target's unit; mean and std are those of the training crystals alone.
    `main` names the entry of `score` that the log shows.
    """

    columns: tuple[str, ...] = ("validation_loss", "validation_mae")
    selects = "validation_mae"
    main = "mae"

    def __init__(
        self,
        crystals: Crystals,
        values: np.ndarray,
        train: Tensor,
        validation: Tensor,
        training: dict[str, Any],
    ):
        super().__init__(train, validation, training["batch_size"])
        self.crystals = crystals
        self.values = values
        self.loss_function = self.choose_loss(training)
        of_train = values[train.numpy()]
        self.mean = float(of_train.mean())
        self.std = float(of_train.std()) or 1.0
        self.targets = self.scaled(values).to(crystals.device)
        self.pads = crystals.pads

    def choose_loss(self, training: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss () of predictions and what they are to be."""
        return LOSSES[training["loss"]]

    def scaled(self, values: np.ndarray) -> Tensor:
        """What the network is to predict (G,), float32."""
        return torch.from_numpy((values - self.mean) / self.std).float()

    def loss(self, network: nn.Module, rows: Tensor, step: int) -> Tensor:
        """Mean loss () of a batch, on standardised targets."""
        own = self.share.of(rows)
        targets = self.targets[own.to(self.targets.device, non_blocking=True)]
        loss = self.loss_function(network(self.crystals.unpadded(own)), targets)
        return loss * self.share.weight(len(own), len(rows))

    def padded_loss(self, network: nn.Module, rows: Tensor, step: int) -> Work:
        """See `Objective`."""
        texts = self.crystals.texts(rows)
        sizes = self.crystals.sizes(rows, *texts)

        def loss(rows: Tensor, *texts: Tensor) -> Tensor:
            return self.loss_function(network(self.crystals.padded(rows, sizes, *texts)), self.targets[rows])

        return sizes, loss, (rows, *texts)

    def predict(self, network: nn.Module, rows: Tensor) -> np.ndarray:
        """Standardised predictions (n,) of `rows`, float32."""
        return predict(network, self.crystals, rows, self.batch_size, self.share, self.recorder)

    def in_unit(self, predicted: np.ndarray) -> np.ndarray:
        """Standardised predictions as float64 in the target's unit."""
        return in_unit(predicted, "regression", self.mean, self.std)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Loss on standardised targets, and mean absolute error in the target's unit."""
        if not len(self.validation):
            return {}
        predicted = self.predict(network, self.validation)
        truth = self.targets[self.validation].cpu()
        return {
            "validation_loss": float(self.loss_function(torch.from_numpy(predicted), truth)),
            "validation_mae": metrics.mae(self.values[self.validation.numpy()], self.in_unit(predicted)),
        }

    def score(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
        """Scores of predictions (n,) in the target's unit."""
        return metrics.scores(truth, predicted)


class Classification(Regression):
    """Cross-entropy of the classes 0 and 1, unweighted; selection by it. The network predicts a logit."""

    columns = ("validation_loss", "validation_accuracy")
    selects = "validation_loss"
    main = "roc_auc"

    def choose_loss(self, training: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
        """Cross-entropy of logits."""
        return functional.binary_cross_entropy_with_logits

    def scaled(self, values: np.ndarray) -> Tensor:
        """The classes (G,), float32."""
        return torch.from_numpy(values).float()

    def in_unit(self, predicted: np.ndarray) -> np.ndarray:
        """Logits as float64 probabilities of class 1."""
        return in_unit(predicted, "classification", self.mean, self.std)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Cross-entropy, and the share of crystals whose class is the more probable one."""
        if not len(self.validation):
            return {}
        logits = torch.from_numpy(self.predict(network, self.validation))
        truth = self.targets[self.validation].cpu()
        right = (logits > 0) == (truth > 0.5)
        return {
            "validation_loss": float(self.loss_function(logits, truth)),
            "validation_accuracy": float(right.double().mean()),
        }

    def score(self, truth: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
        """Scores of probabilities (n,), with the classes cut at 0.5."""
        from castbench.evaluation.classification import class_scores, ranking_scores  # scikit-learn

        return ranking_scores(truth, predicted) | class_scores(truth, predicted > 0.5)


def in_unit(predicted: np.ndarray, task: str, mean: float, std: float) -> np.ndarray:
    """Outputs (n,) of a network as float64 in the target's unit; of a classification, its probability."""
    if task == "classification":
        return torch.from_numpy(predicted).double().sigmoid().numpy()
    return predicted.astype(np.float64) * std + mean


def predict(
    network: nn.Module,
    crystals: Crystals,
    rows: Tensor,
    batch_size: int,
    share: Share = ALONE,
    recorder: Recorder | None = None,
) -> np.ndarray:
    """Standardised predictions (n,) of `rows`, float32; their last bits depend on who shares a batch."""
    found = torch.zeros(len(rows), device=crystals.device)

    def outputs(rows: Tensor, *texts: Tensor, sizes: Sizes) -> Tensor:
        return network(crystals.padded(rows, sizes, *texts)).float()

    with torch.no_grad():
        for places in share.every(batches(torch.arange(len(rows)), batch_size)):
            chosen = rows[places]
            if not crystals.pads:
                predicted = network(crystals.unpadded(chosen)).float()
            else:
                texts = crystals.texts(chosen)
                sizes = crystals.sizes(chosen, *texts)
                function = partial(outputs, sizes=sizes)
                if recorder is None:
                    predicted = function(*(part.to(crystals.device) for part in (chosen, *texts)))
                else:
                    predicted = recorder.run(("predict", sizes), function, chosen, *texts)
            found[places[0] : places[-1] + 1] = predicted
    return share.summed(found).cpu().numpy()


class Pretraining(Objective):
    """A pretraining network's own loss, by which it is also selected; the contrastive one takes no more."""

    columns = ("validation_loss", "validation_accuracy")
    selects = "validation_loss"

    def __init__(
        self, crystals: Crystals, train: Tensor, validation: Tensor, pretraining: dict[str, Any], seed: int
    ):
        super().__init__(train, validation, pretraining["batch_size"])
        self.crystals = crystals
        self.seed = seed
        self.pads = crystals.pads

    def prepare(self, batch: Batch, rows: Tensor, *stream: int | str) -> Batch:
        """Add to a batch what the network needs beyond the caches; random numbers follow from `stream`."""
        return batch

    def outcome(self, network: nn.Module, rows: Tensor, *stream: int | str) -> Work:
        """Loss, number of right guesses and of all, (3,), as a function that can be recorded."""
        sizes = self.crystals.sizes(rows)
        drawn = self.drawn(rows, sizes, *stream)

        def outcome(rows: Tensor, *values: Tensor) -> Tensor:
            own: dict[str, Any] = dict(zip(drawn, values, strict=True))
            found: Outcome = network(replace(self.crystals.padded(rows, sizes), **own))
            return torch.stack([found.loss, found.correct.detach(), found.count])

        return sizes, outcome, (rows, *drawn.values())

    def drawn(self, rows: Tensor, sizes: Sizes, *stream: int | str) -> dict[str, Tensor]:
        """What `prepare` adds to a batch, on the host and padded to its sizes."""
        return {}

    def padded_loss(self, network: nn.Module, rows: Tensor, step: int) -> Work:
        """See `Objective`."""
        key, outcome, inputs = self.outcome(network, rows, self.seed, "train", step)
        return key, lambda *inputs: outcome(*inputs)[0], inputs

    def loss(self, network: nn.Module, rows: Tensor, step: int) -> Tensor:
        """Mean loss () of a batch; of a shared one every process has that of the whole."""
        batch = self.crystals.unpadded(self.share.of(rows))
        if self.share.processes > 1:
            batch.place = self.share.span(len(rows))[0], len(rows)
        return network(batch).loss

    def evaluate(
        self, network: nn.Module, alter: Callable[[Batch, Tensor], Batch] | None = None
    ) -> tuple[float, float]:
        """Mean loss and accuracy on validation, the same guesses each time; `alter` may change a batch."""
        parts = list(enumerate(batches(self.validation, self.batch_size)))
        found = torch.zeros(len(parts), 3, dtype=torch.float64, device=self.crystals.device)
        with torch.no_grad():
            for number, rows in self.share.every(parts):
                if self.recorder is not None and alter is None:
                    key, function, inputs = self.outcome(network, rows, "validation", number)
                    found[number] = self.recorder.run(("validate", key), function, *inputs)
                    continue
                batch = self.crystals.unpadded(rows) if alter is None else self.crystals.batch(rows)
                batch = self.prepare(batch, rows, "validation", number)
                outcome: Outcome = network(batch if alter is None else alter(batch, rows))
                found[number] = torch.stack([outcome.loss.double(), outcome.correct, outcome.count])
        mean, right, guesses = self.share.summed(found).unbind(dim=1)
        return float(mean @ guesses / guesses.sum()), float(right.sum() / guesses.sum())

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Loss and accuracy with each crystal's own text."""
        return dict(zip(self.columns, self.evaluate(network), strict=True))


class MaskedNode(Pretraining):
    """The element of hidden nodes (CAST, 4.3.1): each node is hidden at random, at least one of a crystal."""

    def __init__(
        self, crystals: Crystals, train: Tensor, validation: Tensor, pretraining: dict[str, Any], seed: int
    ):
        super().__init__(crystals, train, validation, pretraining, seed)
        self.probability: float = pretraining["mask_probability"]

    def mask(self, rows: Tensor, *stream: int | str) -> tuple[Tensor, Tensor]:
        """The nodes (N,) of the crystals `rows` (B,) that are hidden, and offsets (B + 1,), on the host."""
        assert self.crystals.nodes is not None
        offsets = self.crystals.nodes.own_offsets(rows)
        return random_mask(offsets, self.probability, *stream), offsets

    def prepare(self, batch: Batch, rows: Tensor, *stream: int | str) -> Batch:
        """Choose the nodes to hide."""
        batch.masked_nodes = self.mask(rows, *stream)[0].to(self.crystals.device)
        return batch

    def drawn(self, rows: Tensor, sizes: Sizes, *stream: int | str) -> dict[str, Tensor]:
        """The nodes to hide."""
        hidden = self.mask(rows, *stream)[0]
        return {"masked_nodes": functional.pad(hidden, (0, sizes.nodes - len(hidden)))}

    def loss(self, network: nn.Module, rows: Tensor, step: int) -> Tensor:
        """Mean loss () over the hidden nodes of a batch, which the processes that share it hide alike."""
        mask, offsets = self.mask(rows, self.seed, "train", step)
        first, end = self.share.span(len(rows))
        own = mask[offsets[first] : offsets[end]]
        batch = self.crystals.unpadded(rows[first:end])
        batch.masked_nodes = own.to(self.crystals.device)
        return network(batch).loss * self.share.weight(int(own.sum()), int(mask.sum()))


def random_mask(offsets: Tensor, probability: float, *stream: int | str) -> Tensor:
    """A mask (N,) of nodes: each with `probability`, at least one in each crystal of offsets (B + 1,)."""
    crystal = segments(offsets)
    draws = torch.rand(len(crystal), generator=generator("mask", *stream))
    lowest = torch.ones(len(offsets) - 1).scatter_reduce(0, crystal, draws, "amin")
    return (draws < probability) | (draws == lowest[crystal])
