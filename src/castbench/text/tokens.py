"""Descriptions as packed token ids, cut once and mapped into memory by every training job."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from castbench.errors import InputError
from castbench.packed import growing_array, read_manifest, write_manifest
from castbench.provenance import measured
from castbench.text import ENCODERS, read_encoder

log = logging.getLogger(__name__)

INDEX = pa.schema(
    [
        ("material_id", pa.string()),
        ("n_tokens_full", pa.int32()),  # before truncation, [CLS] and [SEP] included
        ("n_tokens", pa.int32()),
        ("has_text", pa.bool_()),
    ]
)
BATCH = 512


@dataclass(frozen=True)
class PackedTokens:
    """Token ids of G texts, end to end; the arrays are memory-mapped and read-only.

    Attributes:
        token_ids: (T,) int32, each text with its [CLS] and [SEP]; [CLS] alone where there is no text.
        token_offsets: (G + 1,) int64; text g has tokens token_offsets[g]:token_offsets[g + 1].
        manifest: encoder, limits, counts, and the hash of each file.
    """

    folder: Path
    manifest: dict[str, Any]
    token_ids: np.ndarray
    token_offsets: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map a folder written by `tokenize_text`; InputError where it is missing, damaged or unfinished."""
        manifest = read_manifest(folder, "tokenize_text")
        ids = np.load(folder / "token_ids.npy", mmap_mode="r", allow_pickle=False)
        offsets = np.load(folder / "token_offsets.npy", mmap_mode="r", allow_pickle=False)
        if len(offsets) != manifest["n"] + 1 or offsets[-1] != len(ids):
            raise InputError(f"{folder}: offsets and tokens do not agree; run tokenize_text again")
        return cls(folder, manifest, ids, offsets)

    def __len__(self) -> int:
        return len(self.token_offsets) - 1

    def __getitem__(self, text: int) -> np.ndarray:
        return self.token_ids[self.token_offsets[text] : self.token_offsets[text + 1]]

    def text_ids(self) -> np.ndarray:
        """For each text (G,) the first one with the same tokens."""
        firsts: dict[bytes, int] = {}
        digests = (sha256(self[text].tobytes()).digest() for text in range(len(self)))
        return np.array([firsts.setdefault(digest, text) for text, digest in enumerate(digests)], np.int64)

    def index(self) -> pa.Table:
        """One row a crystal: material_id, n_tokens_full (before truncation), n_tokens, has_text."""
        return pq.read_table(self.folder / "index.parquet")


def tokenize_text(settings: dict[str, Any], descriptions: Path, encoder: Path, output: Path) -> None:
    """Cut descriptions into the encoder's tokens and pack them.

    A text longer than `max_tokens` loses its end, not [SEP]; a crystal without text keeps [CLS] alone, as
    in the paper. MatSciBERT's normalisation goes before its tokenizer.

    Args:
        settings: max_tokens, [CLS] and [SEP] included.
        descriptions: descriptions.parquet.
        encoder: folder of `prefetch_encoder`.
        output: folder for token_ids.npy, token_offsets.npy, index.parquet, manifest.json.

    Raises:
        InputError: the encoder does not reach that far, or has no [CLS] and [SEP].
    """
    # Seconds of import that those who only map tokens need not spend.
    from castbench.text.normalise import normalise_matscibert
    from castbench.text.tokenizer import load_tokenizer

    described = read_encoder(encoder)
    tokenizer = load_tokenizer(encoder)
    max_tokens = settings["max_tokens"]
    limit = min(described["positions"], tokenizer.model_max_length)
    if not 2 <= max_tokens <= limit:
        raise InputError(f"max_tokens {max_tokens}: {described['id']} reads from 2 to {limit}")
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise InputError(f"{described['id']}: its tokenizer has no [CLS] and [SEP]; use an encoder like BERT")
    normalise = normalise_matscibert if described["id"] == ENCODERS["matscibert"].id else None

    output.mkdir(parents=True, exist_ok=True)
    (output / "manifest.json").unlink(missing_ok=True)
    seen = sha256()
    full: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    with_text: list[np.ndarray] = []
    with (
        measured(output / "cost.json"),
        growing_array(output / "token_ids.npy", np.int32) as append,
        pq.ParquetWriter(output / "index.parquet", INDEX) as index,
    ):
        for material_ids, texts in _batches(descriptions):
            for pair in zip(material_ids, texts, strict=True):
                seen.update(repr(pair).encode())
            cut = [(text or "").strip() for text in texts]  # as `Reader` does
            cut = [normalise(text) if normalise else text for text in cut]
            encoded = tokenizer(cut, add_special_tokens=True, truncation=False, padding=False, verbose=False)
            has_text = np.array([bool(text and text.strip()) for text in texts], dtype=bool)
            lengths = np.array([len(ids) for ids in encoded["input_ids"]], dtype=np.int32)
            lengths[~has_text] = 1
            for ids, has in zip(encoded["input_ids"], has_text, strict=True):
                if not has:
                    ids = [tokenizer.cls_token_id]
                elif len(ids) > max_tokens:
                    ids = [*ids[: max_tokens - 1], tokenizer.sep_token_id]
                append(np.array(ids))
            full.append(lengths)
            kept.append(np.minimum(lengths, max_tokens))
            with_text.append(has_text)
            index.write_table(pa.table([material_ids, full[-1], kept[-1], has_text], schema=INDEX))
    n_full, n_kept, has = (
        np.concatenate(parts) if parts else np.zeros(0) for parts in (full, kept, with_text)
    )
    np.save(output / "token_offsets.npy", np.concatenate([[0], np.cumsum(n_kept)]).astype(np.int64))
    n = len(n_full)
    statistics = {
        "n": n,
        "n_tokens": int(n_kept.sum()),
        "text_rate": float(has.mean()) if n else 0.0,
        "share_truncated": float((n_full > max_tokens).mean()) if n else 0.0,
        "n_tokens_full_mean": float(n_full.mean()) if n else 0.0,
        "n_tokens_full_std": float(n_full.std()) if n else 0.0,
    }
    write_manifest(
        output,
        "tokenize_text",
        {
            "encoder": {key: described[key] for key in ("id", "revision", "checksum")},
            "normalise": "matscibert" if normalise else "none",
            "max_tokens": max_tokens,
            "source": seen.hexdigest(),  # of ids and texts; the file itself also holds seconds
            **statistics,
        },
        ["token_ids.npy", "token_offsets.npy", "index.parquet"],
    )
    log.info("%d texts in tokens of %s: %s", n, described["id"], statistics)


def _batches(descriptions: Path) -> Iterator[tuple[list[str], list[str | None]]]:
    for batch in pq.ParquetFile(descriptions).iter_batches(BATCH, columns=["material_id", "text"]):
        yield batch.column("material_id").to_pylist(), batch.column("text").to_pylist()
