"""What every model has in common: its encoders, needed inputs, parameter groups and trained state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from castbench.errors import InputError
from castbench.models.batch import ABSENT

if TYPE_CHECKING:
    from castbench.models.structure import StructureEncoder
    from castbench.models.text import TextEncoder

RUNNING = (".running_mean", ".running_var")  # statistics of batch normalisation


@dataclass  # not frozen: Fabric walks through what a module returns
class Outcome:
    """A pretraining network on a batch: the mean loss over `count` guesses, `correct` of them right."""

    loss: Tensor
    correct: Tensor
    count: Tensor


class Network(nn.Module):
    """A model with at most one structure encoder `structure` and one text encoder `text`.

    A prediction model maps a batch to (B,) standardised predictions, a pretraining model to an `Outcome`.
    """

    pretrained: tuple[str, ...] = ()  # submodules that start from the pretraining network

    def __init__(self, structure: StructureEncoder = ABSENT, text: TextEncoder = ABSENT):
        super().__init__()
        self.structure = structure
        self.text = text

    @property
    def needs(self) -> frozenset[str]:
        """The parts of a batch that are read: "graph"; "token_ids", "token_states" or "cls_states"."""
        graph = {"graph"} if self.structure is not None else set()
        return frozenset(graph | (self.text.needs if self.text is not None else set()))

    @property
    def structure_encoder(self) -> str | None:
        """Name of the structure encoder, whose graphs are read."""
        return None if self.structure is None else self.structure.name

    @property
    def takes_padded(self) -> bool:
        """Whether it reads padded batches, and nothing that it does depends on what only the device knows."""
        return all(encoder is None or encoder.takes_padded for encoder in (self.structure, self.text))

    @property
    def text_mode(self) -> str:
        """How the text encoder is used: "none", "frozen" or "lora"."""
        return "none" if self.text is None else self.text.mode

    @property
    def text_layer(self) -> int | None:
        """Number of encoder layers behind the cached states that are read; None where none are read."""
        return None if self.text is None or "token_ids" in self.needs else self.text.start_layer

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters: "lora" (adapters of the text encoder) and "new" (all others)."""
        groups: dict[str, list[nn.Parameter]] = {"new": [], "lora": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["lora" if ".lora_" in name else "new"].append(parameter)
        return groups

    def trained_state(self) -> dict[str, Tensor]:
        """Trainable parameters and running means by name: all that it takes to rebuild the model, beside the
        frozen text encoder."""
        state = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
        if self.structure is not None:
            buffers = self.structure.named_buffers(prefix="structure")
            state |= {name: buffer for name, buffer in buffers if name.endswith(RUNNING)}
        return state

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Load what `trained_state` gave.

        Raises:
            InputError: a parameter is absent, unknown or of another shape.
        """
        own = self.trained_state()
        wrong = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if own[k].shape != state[k].shape)
        if wrong:
            raise InputError(
                f"model state: {wrong[0]} does not fit this architecture; use the settings of its training"
            )
        self.load_state_dict(state, strict=False)
