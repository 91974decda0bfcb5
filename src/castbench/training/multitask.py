"""Several targets at once: smooth L1 for numbers, focal loss for classes (EDM report, section 5.12)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench.evaluation.classification import average_precision, balanced_accuracy
from castbench.evaluation.metrics import scores
from castbench.models.composition import Compositions
from castbench.training.objectives import Objective
from castbench.training.schedule import batches, generator

BETA = 0.5  # of the smooth L1 loss, on standardised targets
GAMMA = 2.0  # of the focal loss
REPORT_ALPHA = 0.25  # of the class that the report calls the majority, stable (it is the minority)
CLASS_COLUMNS = ("average_precision", "balanced_accuracy")
NUMBER_COLUMNS = ("mae", "rmse", "r2")
BATCH = 512  # compositions predicted at once


def focal_loss(logits: Tensor, labels: Tensor, alpha: tuple[float, float], gamma: float = GAMMA) -> Tensor:
    """Mean of -alpha_t (1 - p_t)^gamma log p_t (Lin et al. 2017), from logits (B,) and labels 0 or 1 (B,).

    Args:
        logits: of class 1.
        labels: float.
        alpha: weights of class 0 and class 1; with (1, 1) and gamma 0 this is the cross-entropy.
        gamma: how much less a confident right answer counts.
    """
    log_p = -functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    weight = torch.where(labels > 0.5, alpha[1], alpha[0])
    return -(weight * (1 - log_p.exp()) ** gamma * log_p).mean()


def class_weights(kind: str, labels: np.ndarray) -> tuple[tuple[float, float], float]:
    """(alpha of class 0 and of class 1, gamma) of a loss.

    Args:
        kind: "inverse_frequency": alpha falls with the number of training compositions of the class, and sums
            to 1; "report": 0.25 for the positive class, 0.75 for the other; "cross_entropy": no weights.
        labels: (n,) classes of the training compositions.
    """
    if kind == "cross_entropy":
        return (1.0, 1.0), 0.0
    if kind == "report":
        return (1 - REPORT_ALPHA, REPORT_ALPHA), GAMMA
    positive = float(labels.mean())
    return (positive, 1 - positive), GAMMA


class MultiTask(Objective):
    """The objective of composition models: a loss a target, summed, plainly or with learned weights.

    A missing value takes no part in its target's loss.

    Args:
        compositions: source of batches.
        values: {target: (n,)} in the target's unit or classes 0 and 1, NaN where missing.
        classification: which targets are classes.
        rows: rows of train and validation.
        training: section of the config.
        loss: kind of classification loss, see `class_weights`.
    """

    selects = "validation_loss"

    def __init__(
        self,
        compositions: Compositions,
        values: dict[str, np.ndarray],
        classification: list[str],
        rows: dict[str, Tensor],
        training: dict[str, Any],
        loss: str,
    ):
        super().__init__(rows["train"], rows["validation"], training["batch_size"])
        self.compositions, self.truth, self.classification = compositions, values, classification
        # As many training compositions as there are for validation show how far apart the two are.
        chosen = torch.randperm(len(self.rows), generator=generator("training subset"))
        self.subset = self.rows[chosen[: len(self.validation)]]
        self.scale: dict[str, tuple[float, float]] = {}
        self.weights: dict[str, tuple[tuple[float, float], float]] = {}
        self.targets: dict[str, Tensor] = {}
        for target, every in values.items():
            known = every[self.rows.numpy()]
            known = known[np.isfinite(known)]
            if target in classification:
                self.weights[target] = class_weights(loss, known)
                self.scale[target] = (0.0, 1.0)
            else:
                self.scale[target] = (float(known.mean()), float(known.std()) or 1.0)
            mean, std = self.scale[target]
            self.targets[target] = torch.from_numpy((every - mean) / std).float().to(compositions.device)

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the values that `validate` may return."""
        own = ["validation_loss"]
        for target in self.truth:
            kinds = CLASS_COLUMNS if target in self.classification else NUMBER_COLUMNS
            own += [f"{part}_{target}_{kind}" for part in ("train", "validation") for kind in kinds]
        return tuple(own)

    def task_losses(
        self, predicted: dict[str, Tensor], rows: Tensor, whole: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Mean loss () of each target over the compositions `rows` that have it.

        Where they are this process's part of the rows `whole`, the mean of all processes is that over these.
        """
        losses = {}
        for target, every in self.targets.items():
            truth, known = every[rows], every[rows].isfinite()
            output, truth = predicted[target][known], truth[known]
            if not len(truth):
                losses[target] = predicted[target].sum() * 0
            elif target in self.weights:
                losses[target] = focal_loss(output, truth, *self.weights[target])
            else:
                losses[target] = functional.smooth_l1_loss(output, truth, beta=BETA)
            if whole is not None and self.share.processes > 1 and len(truth):
                losses[target] *= self.share.weight(len(truth), int(every[whole].isfinite().sum()))
        return losses

    def loss(self, network: nn.Module, rows: Tensor, step: int) -> Tensor:
        """Sum of the tasks' losses (), or, with learned weights, the likelihood of Kendall et al. 2018.

        That is L / (2 sigma^2) + log sigma for a regression, L / sigma^2 + log sigma for a classification.
        """
        part = self.share.of(rows)
        losses = self.task_losses(network(self.compositions.batch(part)), part, rows)
        own: Any = getattr(network, "module", network)
        if own.log_variances is None:
            return torch.stack(list(losses.values())).sum()
        total = torch.zeros((), device=self.compositions.device)
        for log_variance, (target, loss) in zip(own.log_variances, losses.items(), strict=True):
            share = 1.0 if target in self.weights else 0.5
            total = total + share * torch.exp(-log_variance) * loss + 0.5 * log_variance
        return total

    def predict(self, network: nn.Module, rows: Tensor) -> dict[str, Tensor]:
        """{target: (n,)} raw outputs of `rows` on the host, float32."""
        every = {target: torch.zeros(len(rows), device=self.compositions.device) for target in self.truth}
        with torch.inference_mode():
            for places in self.share.every(batches(torch.arange(len(rows)), BATCH)):
                for target, found in network(self.compositions.batch(rows[places])).items():
                    every[target][places[0] : places[-1] + 1] = found.float()
        return {target: self.share.summed(found).cpu() for target, found in every.items()}

    def in_unit(self, predicted: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Raw outputs as float64: numbers in their unit, probabilities of class 1."""
        return to_unit(predicted, self.scale, self.classification)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Plain sum of the losses on validation; scores there and on as many training compositions."""
        raw = self.predict(network, self.validation)
        on_device = {target: found.to(self.compositions.device) for target, found in raw.items()}
        loss = sum(float(part) for part in self.task_losses(on_device, self.validation).values())
        row = {"validation_loss": loss}
        for part, rows in (("train", self.subset), ("validation", self.validation)):
            found = raw if part == "validation" else self.predict(network, rows)
            for target, predicted in self.in_unit(found).items():
                truth = self.truth[target][rows.numpy()]
                known = np.isfinite(truth)
                if not known.any():
                    continue
                truth, predicted = truth[known], predicted[known]
                measured: dict[str, float | None]
                if target in self.classification:
                    measured = {
                        "average_precision": average_precision(truth, predicted),
                        "balanced_accuracy": balanced_accuracy(truth, predicted >= 0.5),
                    }
                else:
                    measured = scores(truth, predicted)
                row |= {f"{part}_{target}_{kind}": v for kind, v in measured.items() if v is not None}
        return row


def to_unit(
    predicted: dict[str, Tensor], scale: dict[str, tuple[float, float]], classification: list[str]
) -> dict[str, np.ndarray]:
    """Raw outputs as float64: numbers in their unit (`scale` is mean and std), probabilities of class 1."""
    found = {}
    for target, output in predicted.items():
        if target in classification:
            found[target] = output.double().sigmoid().numpy()
        else:
            mean, std = scale[target]
            found[target] = output.double().numpy() * std + mean
    return found
