"""The optimiser of every model: AdamW, whose steps are few kernels on a GPU.

Chosen where the papers are silent: weight decay acts on weight matrices alone (not on biases, norms, LoRA);
the norm of the gradient is clipped at 1, if the config says nothing else, so that no single batch throws a
run off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from castbench import kernels
from castbench.models.base import Network

MAX_GRADIENT_NORM = 1.0
RATES = {"new": "learning_rate", "lora": "lora_learning_rate", "encoder": "encoder_learning_rate"}
MOMENTS = ("exp_avg", "exp_avg_sq")
ALIGNED = 64  # values: each parameter begins where the GPU's kernels can read 16 bytes at once


def make_optimizer(
    network: Network, training: dict[str, Any], device: torch.device | None = None
) -> torch.optim.AdamW:
    """AdamW; each group of parameters has its `peak` rate, and its matrices decay, those of LoRA excepted.

    On a GPU, where the network is to be already, all that a step depends on is there, so that it can be
    recorded.
    """
    decay, kinds = training["weight_decay"], []
    for name, parameters in network.parameter_groups().items():
        if not parameters:
            continue
        peak = training[RATES[name]]
        matrices = [p for p in parameters if p.ndim > 1 and name != "lora"]
        others = [p for p in parameters if p.ndim <= 1 or name == "lora"]
        kinds += [(matrices, peak, decay), (others, peak, 0.0)]
    there = device is not None and device.type == "cuda"
    groups = [
        {
            "params": ps,
            "lr": torch.tensor(peak, device=device) if there else peak,
            "peak": peak,
            "weight_decay": wd,
        }
        for ps, peak, wd in kinds
        if ps
    ]
    if device is not None and kernels.usable("adamw", device):
        return FlatAdamW(groups)
    optimizer = torch.optim.AdamW(groups, fused=True, capturable=there)
    if there:  # else the first step would make them, each time that it is replayed
        for group in groups:
            for p in group["params"]:
                zeros = {name: torch.zeros_like(p, device=device) for name in MOMENTS}
                optimizer.state[p] = {"step": torch.zeros((), device=device), **zeros}
    return optimizer


def clip_gradients(optimizer: torch.optim.AdamW, longest: float | None) -> None:
    """Shorten the gradient to a norm, if it is longer; None leaves it."""
    if isinstance(optimizer, FlatAdamW):
        optimizer.longest = longest  # the step does it
    elif longest is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], longest)


class FlatAdamW(torch.optim.AdamW):
    """AdamW on parameters and moments that are parts of flat tensors, by `kernels/adamw.py`.

    Every parameter has a state of its own as with torch, a part of the flat ones; one without a gradient is
    taken to have a gradient of 0.

    Args:
        groups: of parameters on the GPU, each with "lr" () there and "weight_decay".
    """

    def __init__(self, groups: list[dict[str, Any]]):
        from castbench.kernels.adamw import BLOCK

        super().__init__(groups, fused=True, capturable=True)
        self.longest: float | None = None
        device = self.param_groups[0]["params"][0].device
        self.pieces: list[nn.Parameter | int] = []  # parameters, and how many zeros stand between two
        places: list[tuple[nn.Parameter, int]] = []
        owners: list[int] = []  # group of each block
        end = 0
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                places.append((p, end))
                self._add(p)
                end += p.numel()
                last = p is group["params"][-1]
                gap = -end % (BLOCK if last else ALIGNED)  # a block is of one group
                self._add(gap)
                end += gap
            owners += [number] * (end // BLOCK - len(owners))
        self.groups = torch.tensor(owners, dtype=torch.int32, device=device)
        self.decays = torch.tensor([group["weight_decay"] for group in self.param_groups], device=device)
        self.rates = torch.stack([group["lr"] for group in self.param_groups])
        self.flat = {name: torch.zeros(end, device=device) for name in ("value", *MOMENTS)}
        self.counts = torch.zeros(len(places), device=device)
        self.zeros = torch.zeros(BLOCK, device=device)
        self.own: dict[nn.Parameter, dict[str, Tensor]] = {}
        with torch.no_grad():
            for number, (p, start) in enumerate(places):
                parts = {
                    name: whole[start : start + p.numel()].view(p.shape) for name, whole in self.flat.items()
                }
                p.data = parts.pop("value").copy_(p)
                self.own[p] = {"step": self.counts[number], **parts}
        self._keep()

    def _add(self, piece: nn.Parameter | int) -> None:
        if not isinstance(piece, int) or piece:
            self.pieces.append(piece)

    def _keep(self) -> None:
        """Let states and rates be the parts of the flat tensors, with the values that they have."""
        for p, own in self.own.items():
            for name, value in self.state[p].items():
                own[name].copy_(value)
            self.state[p] = own
        for number, group in enumerate(self.param_groups):
            self.rates[number] = group["lr"]
            group["lr"] = self.rates[number]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch."""
        super().load_state_dict(state_dict)
        self._keep()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step on the gradients, shortened to the norm `longest`."""
        from castbench.kernels import adamw

        gradients = []
        for piece in self.pieces:
            if isinstance(piece, int):
                gradients.append(self.zeros[:piece])
            elif piece.grad is None:
                gradients.append(torch.zeros_like(piece).view(-1))
            else:
                gradients.append(piece.grad.reshape(-1))
        self.counts += 1
        settings = self.param_groups[0]
        adamw.step(
            self.flat["value"], torch.cat(gradients), self.flat["exp_avg"], self.flat["exp_avg_sq"],
            self.counts[0], self.groups, self.rates, self.decays, settings["betas"], settings["eps"],
            self.longest,
        )  # fmt: skip
