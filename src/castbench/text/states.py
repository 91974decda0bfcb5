"""Hidden states of the frozen part of a text encoder, computed once so that no training step repeats it."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from castbench.errors import InputError
from castbench.packed import read_manifest, write_manifest
from castbench.provenance import atomic_path, measured, sha256_file
from castbench.text import read_encoder
from castbench.text.tokens import PackedTokens

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

BATCH_TOKENS = 4096  # padded tokens run at once
REPORT = 20  # lines of progress


@dataclass(frozen=True)
class PackedStates:
    """Hidden states (T, d) of the tokens of `PackedTokens`, memory-mapped, with the same offsets.

    They are bfloat16, which numpy lacks: `states` (T, d) uint16 holds their bits.

    `manifest["layer"]` layers have been run: 0 gives the embeddings, all of them the final states.
    """

    folder: Path
    manifest: dict[str, Any]
    states: np.ndarray

    @classmethod
    def open(cls, folder: Path, tokens: Path | None = None) -> Self:
        """Map a folder written by `embed_text`.

        Args:
            folder: text_states/{remaining}/.
            tokens: the folder of tokens that the states must be of; None takes any.

        Raises:
            InputError: missing, damaged, unfinished, or of other tokens.
        """
        manifest = read_manifest(folder, "embed_text")
        if tokens is not None and manifest["tokens"] != sha256_file(tokens / "manifest.json"):
            raise InputError(f"{folder}: states of other tokens than {tokens}; run embed_text again")
        states = np.load(folder / "states.npy", mmap_mode="r", allow_pickle=False)
        if states.shape != (manifest["n_tokens"], manifest["hidden_size"]) or states.dtype != np.uint16:
            raise InputError(f"{folder}: states.npy is not what its manifest says; run embed_text again")
        return cls(folder, manifest, states)


def round_states(states: "Tensor") -> "Tensor":
    """Hidden states as they are kept: in the type of bf16-mixed training, with float32's range."""
    return states.bfloat16()


def embed_text(tokens: Path, encoder: Path, remaining: int, output: Path, device: str = "auto") -> None:
    """Run all but the last `remaining` layers of the encoder on every text and keep their states.

    Texts are run with others of similar length, equal ones once.

    Args:
        tokens: folder of `tokenize_text`.
        encoder: folder of `prefetch_encoder`.
        remaining: layers left to the models; 0 gives the encoder's final states.
        output: folder for states.npy (T, d), the bits of bfloat16 as uint16, and manifest.json.
        device: auto, cpu or cuda.

    Raises:
        InputError: tokens of another encoder, more layers than there are, or states that are not finite.
    """
    import torch

    from castbench.cards import choose_device
    from castbench.text.encoders import LayeredEncoder

    packed = PackedTokens.open(tokens)
    checksum = read_encoder(encoder)["checksum"]
    if packed.manifest["encoder"]["checksum"] != checksum:
        raise InputError(f"{tokens}: tokens of another encoder than {encoder}; run tokenize_text again")
    chosen = choose_device(device)
    model = LayeredEncoder.from_folder(encoder).to(chosen)
    layer = model.n_layers - remaining
    if not 0 <= layer <= model.n_layers:
        raise InputError(f"embed_text: {remaining} layers cannot remain; the encoder has {model.n_layers}")

    output.mkdir(parents=True, exist_ok=True)
    (output / "manifest.json").unlink(missing_ok=True)
    shape = (len(packed.token_ids), model.hidden_size)
    groups = _equal_texts(packed)
    firsts = np.array([texts[0] for texts in groups], dtype=np.int64)
    lengths = np.diff(packed.token_offsets)[firsts]
    done, report_at = 0, 0.0
    with (
        measured(output / "cost.json"),
        atomic_path(output / "states.npy") as partial,
        torch.inference_mode(),
    ):
        states = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint16, shape=shape)
        for batch in _buckets(lengths):
            ids_BT = np.zeros((len(batch), lengths[batch].max()), dtype=np.int64)
            for row, group in enumerate(batch):
                ids_BT[row, : lengths[group]] = packed[firsts[group]]
            mask_BT = torch.from_numpy(np.arange(ids_BT.shape[1]) < lengths[batch, None]).to(chosen)
            hidden_BTd = model.embed(torch.from_numpy(ids_BT).to(chosen))
            hidden_BTd = round_states(model.run(hidden_BTd, mask_BT, 0, layer))
            if not torch.isfinite(hidden_BTd[mask_BT]).all():
                raise InputError(f"{encoder}: hidden states are not finite; use another encoder")
            result_BTd = hidden_BTd.view(torch.uint16).cpu().numpy()
            for row, group in enumerate(batch):
                for text in groups[group]:
                    start = packed.token_offsets[text]
                    states[start : start + lengths[group]] = result_BTd[row, : lengths[group]]
            done += len(batch)
            if done >= report_at:
                log.info("%d of %d different texts embedded", done, len(groups))
                report_at = done + len(groups) / REPORT
        states.flush()
        del states
    write_manifest(
        output,
        "embed_text",
        {
            "encoder": packed.manifest["encoder"],
            "layer": layer,
            "remaining": remaining,
            "hidden_size": shape[1],
            "n_tokens": shape[0],
            "n_texts": len(groups),
            "tokens": sha256_file(tokens / "manifest.json"),
        },
        ["states.npy"],
    )


def _equal_texts(packed: PackedTokens) -> list[list[int]]:
    """Indices of the texts, those with the same tokens together."""
    groups: dict[int, list[int]] = {}
    for text, first in enumerate(packed.text_ids().tolist()):
        groups.setdefault(first, []).append(text)
    return list(groups.values())


def _buckets(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Batches of indices, longest first, each of at most BATCH_TOKENS padded tokens (or one text)."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, BATCH_TOKENS // int(lengths[order[start]]))
        yield order[start:stop]
        start = stop
