"""Pretrained BERT-like text encoders: fetched once, verified by hash, run layer by layer."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import create_bidirectional_mask

from castbench.errors import InputError
from castbench.provenance import sha256_file

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"


class LayeredEncoder(nn.Module):
    """A BERT-like encoder whose layers can be run a few at a time, so that cached states replace the lower ones.

    Running all layers gives the last hidden state of the model it is made from; the pooler is left out.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        layers = getattr(getattr(model, "encoder", None), "layer", None)
        if not isinstance(layers, nn.ModuleList) or not hasattr(model, "embeddings"):
            kind = model.config.model_type
            raise InputError(f"text encoder of type {kind}: not built like BERT; use an encoder of the BERT family")
        self.config = model.config
        self.embeddings = model.embeddings
        self.layers = layers

    @classmethod
    def from_folder(cls, folder: Path) -> "LayeredEncoder":
        """Read a verified encoder folder (see `load_encoder`)."""
        return cls(load_encoder(folder)).eval()

    @property
    def n_layers(self) -> int:
        """Number of transformer layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width d of the hidden states."""
        return self.config.hidden_size

    def embed(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T), padded with any id, to input embeddings (B, T, d)."""
        return self.embeddings(input_ids=token_ids_BT)

    def run(self, hidden_BTd: torch.Tensor, mask_BT: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Run layers start, ..., stop - 1 on hidden states (B, T, d); the boolean mask is true at real tokens."""
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_BTd, attention_mask=mask_BT
        )
        for layer in self.layers[start:stop]:
            hidden_BTd = layer(hidden_BTd, attention_mask)
        return hidden_BTd


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of an encoder folder after checking every file's SHA-256 against it.

    Raises:
        InputError: no manifest, or a file is missing or damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no text encoder is here; run the rule prefetch_encoder first") from error
    for name, sha256 in manifest["files"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != sha256:
            raise InputError(f"{folder / name}: missing or damaged; remove the folder and run prefetch_encoder again")
    return manifest


def load_encoder(folder: Path) -> PreTrainedModel:
    """Verified encoder of a folder in float32 and evaluation mode; from safetensors only, without a network.

    Raises:
        InputError: the folder is missing or damaged, or its weights do not fill the model.
    """
    read_manifest(folder)
    model, report = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    absent = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if absent or report["mismatched_keys"]:
        raise InputError(f"{folder / WEIGHTS}: weights are missing ({', '.join(absent[:3])} ...); use a complete file")
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Fast tokenizer of a verified encoder folder."""
    read_manifest(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
