"""The text encoder in a model: cached states as they are (frozen), or its upper layers tuned with LoRA.

The frozen weights never see dropout, so that their part of the network is one fixed function; only LoRA's own
dropout is active in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from castbench.errors import InputError
from castbench.models.attention import KERNEL_WIDTH
from castbench.models.base import Network
from castbench.models.batch import ABSENT, Batch, Texts, different_texts, pad, rows_of, unpad
from castbench.models.heads import Regression
from castbench.text import read_encoder

if TYPE_CHECKING:
    from castbench.text.encoders import LayeredEncoder


class TextEncoder(nn.Module):
    """Token states (T, width) or [CLS] states (B, width) of a text encoder.

    Frozen (`lora` is None), it hands on the cached final states, and the encoder's weights are not loaded;
    where [CLS] alone is read (`pooled`), no others.
    With `lora` {rank, alpha, dropout, layers}, it starts from cached states below the top `layers` layers, or
    from token ids where that is all of them, and adapts query and value of those layers.

    Raises:
        InputError: no encoder is in the folder; `layers` is neither "all" nor between 1 and their number.
    """

    def __init__(self, encoder: Path, lora: dict[str, Any] | None, pooled: bool = False):
        super().__init__()
        described = read_encoder(encoder, names=())
        self.width: int = described["hidden_size"]
        self.n_layers: int = described["layers"]
        self.start_layer = (
            self.n_layers if lora is None else self.n_layers - adapted_layers(lora, self.n_layers)
        )
        self.mode = "frozen" if lora is None else "lora"
        self.pooled = pooled
        self.needs = {"token_states"} if self.start_layer else {"token_ids"}
        if pooled and lora is None:
            self.needs = {"cls_states"}
        self.encoder = ABSENT if lora is None else load_with_lora(encoder, lora, self.start_layer)

    @property
    def takes_padded(self) -> bool:
        """See `Network`: cached states as they are, or what the kernels of attention make of padded texts."""
        if self.mode == "frozen":
            return "token_ids" not in self.needs
        return self.pooled and self.width // self.encoder.config.num_attention_heads <= KERNEL_WIDTH

    def train(self, mode: bool = True) -> TextEncoder:
        """Training mode for LoRA's dropout alone."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
            for name, module in self.encoder.named_modules():
                if "lora_dropout" in name:
                    module.train(mode)
        return self

    def read_ids(self, encoder: Path) -> None:
        """Run every layer from token ids from now on, so that texts can be read that no cache holds.

        Predictions differ from those on cached states by the rounding of these to bfloat16.
        """
        if self.encoder is None:
            from castbench.text.encoders import LayeredEncoder

            self.encoder = LayeredEncoder.from_folder(encoder).requires_grad_(False)
        self.start_layer, self.needs = 0, {"token_ids"}

    def attend(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """States of all tokens (T, width), and the attention of [CLS] in each layer that is run (B, H, T).

        Explicit, and the same states as `forward`; a row sums to 1 over the text's tokens, with 0 at padding.
        """
        if self.encoder is None:
            raise ValueError("cached states tell no attention; call read_ids first")
        if self.start_layer:
            hidden_BTd, mask_BT = pad(batch.token_states.float(), batch.token_offsets)
        else:
            ids_BT, mask_BT = pad(batch.token_ids, batch.token_offsets)
            hidden_BTd = self.encoder.embed(ids_BT)
        hidden_BTd, maps = self.encoder.attend(hidden_BTd, mask_BT, self.start_layer, self.n_layers)
        return unpad(hidden_BTd, batch.token_offsets), [weights_BHTT[:, :, 0] for weights_BHTT in maps]

    def forward(self, batch: Batch) -> Tensor:
        """States of all tokens (T, width)."""
        if self.encoder is None:
            return batch.token_states
        hidden_Td, offsets, texts = self._run(batch, self.n_layers)
        tokens = batch.token_states if self.start_layer else batch.token_ids
        return hidden_Td.index_select(0, rows_of(offsets, texts.of, len(tokens))[0])

    def cls(self, batch: Batch) -> Tensor:
        """States of the first token of each text (B, width); the last layer is evaluated for it alone."""
        if self.encoder is None:
            return batch.cls_states.float()
        hidden_Td, offsets, texts = self._run(batch, self.n_layers - 1)
        return self.encoder.run_first(self.encoder.layers[-1], hidden_Td, offsets, texts.padded)[texts.of]

    def _run(self, batch: Batch, stop: int) -> tuple[Tensor, Tensor, Texts]:
        """Different texts, sorted by length, through the layers below `stop`.

        Returns their states (t, width), offsets (b + 1,), and which of them each crystal has.
        """
        texts, offsets = batch.texts, batch.token_offsets
        tokens = batch.token_states if self.start_layer else batch.token_ids
        if texts is None:
            texts = different_texts(offsets.cpu()).to(offsets.device)
        if not texts.padded:
            rows, offsets = rows_of(offsets, texts.first, texts.size)
            tokens = tokens.index_select(0, rows)
        hidden_Td = tokens.float() if self.start_layer else self.encoder.embed_packed(tokens, offsets)
        layers = self.start_layer, stop
        return self.encoder.run_packed(hidden_Td, offsets, *layers, texts.padded), offsets, texts


def adapted_layers(lora: dict[str, Any], n_layers: int) -> int:
    """Number of upper layers that LoRA adapts.

    Raises:
        InputError: `layers` is neither "all" nor between 1 and `n_layers`.
    """
    layers = n_layers if lora["layers"] == "all" else lora["layers"]
    if not isinstance(layers, int) or not 1 <= layers <= n_layers:
        raise InputError(f"architecture.lora.layers: {layers}; write all or a number from 1 to {n_layers}")
    return layers


def load_with_lora(folder: Path, lora: dict[str, Any], start_layer: int) -> LayeredEncoder:
    """The encoder, frozen, with LoRA on query and value of the layers from `start_layer` on."""
    # Late imports: seconds that models on cached states need not spend.
    from peft import LoraConfig, inject_adapter_in_model

    from castbench.text.encoders import LayeredEncoder

    encoder = LayeredEncoder.from_folder(folder).requires_grad_(False)
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=["query", "value"],
        layers_to_transform=list(range(start_layer, encoder.n_layers)),
        layers_pattern="layers",
    )
    inject_adapter_in_model(config, encoder)  # in place
    return encoder


class TextOnly(Network):
    """The text encoder tuned with LoRA, and a linear head on [CLS]; reads no graph."""

    def __init__(self, architecture: dict[str, Any], encoder: Path):
        super().__init__(text=TextEncoder(encoder, architecture["lora"], pooled=True))
        self.head = Regression(self.text.width)

    def forward(self, batch: Batch) -> Tensor:
        """Standardised predictions (B,)."""
        return self.head(self.text.cls(batch))

    def attention_maps(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Predictions (B,) and [CLS]'s attention in each layer that the model runs (B, H, T)."""
        states, maps = self.text.attend(batch)
        return self.head(states[batch.token_offsets[:-1]]), maps
