"""Descriptions, tokens and language-model states.

What is asked about an encoder without its weights stands here, importable without torch.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castbench.errors import InputError
from castbench.provenance import sha256_file

WEIGHTS = "model.safetensors"
# Weights as safetensors alone: no pickle is ever read, nor downloaded.
FILES = (
    "config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
    "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """A Hugging Face encoder: Hub id or folder, revision, SHA-256 of model.safetensors where known."""

    id: str
    revision: str
    sha256: str | None = None


ENCODERS = {
    "minilm": Encoder(
        "sentence-transformers/all-MiniLM-L6-v2",
        "1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    # The first revision that carries model.safetensors beside the pickle.
    "matscibert": Encoder(
        "m3rg-iitd/matscibert",
        "ced9d8f5f208712c4a90f98a246fe32155b29995",
        "77d9d94ef2a9091fa1c53999e73d477556ad8898a6ae60b3b2ad435e79a1cc74",
    ),
}


def parse_encoder(encoder: str) -> Encoder:
    """Resolve `minilm`, `matscibert` or `<Hub id or folder>@revision`.

    Raises:
        InputError: neither a known name nor a folder, and no revision is pinned.
    """
    if encoder in ENCODERS:
        return ENCODERS[encoder]
    name, at, revision = encoder.rpartition("@")
    if at and name and revision:
        return Encoder(name, revision)
    if Path(encoder).is_dir():
        return Encoder(encoder, "local")
    known = " | ".join(ENCODERS)
    raise InputError(f"text_encoder {encoder}: no such encoder; use {known} | <Hub id or folder>@revision")


def slug(encoder: str) -> str:
    """Folder name of an encoder below results/encoders/: its name, or a readable tail and a hash."""
    if encoder in ENCODERS:
        return encoder
    tail = re.sub(r"[^A-Za-z0-9.]+", "-", encoder.partition("@")[0].rstrip("/").rpartition("/")[2])
    return f"{tail}-{hashlib.sha256(encoder.encode()).hexdigest()[:8]}"


def how_to_fetch(folder: Path) -> str:
    """What to do where the files of an encoder are not in `folder`."""
    return (
        "run the rule prefetch_encoder where there is a network, such as a login node, "
        f"and copy the folder {folder} here"
    )


def find_encoder(folder: Path, checksum: str) -> Path:
    """The folder of the encoder with this checksum, among those in `folder`.

    Raises:
        InputError: it is not there.
    """
    for manifest in sorted(folder.glob("*/manifest.json")):
        if json.loads(manifest.read_text(encoding="utf-8"))["checksum"] == checksum:
            return manifest.parent
    raise InputError(f"{folder}: does not hold the text encoder of this run; run the rule prefetch_encoder")


def read_encoder(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Manifest of a folder of `prefetch_encoder` after checking files' SHA-256 against it.

    Args:
        folder: of the encoder.
        names: files to check, when others will not be read; None: all.

    Raises:
        InputError: no manifest, or a file is missing or damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no text encoder is here; {how_to_fetch(folder)}") from error
    for name in manifest["files"] if names is None else names:
        if not (folder / name).is_file() or sha256_file(folder / name) != manifest["files"].get(name):
            raise InputError(
                f"{folder / name}: missing or damaged; remove the folder, {how_to_fetch(folder)}"
            )
    return manifest
