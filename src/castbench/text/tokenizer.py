"""The tokenizer of a text encoder, without the model, whose import takes seconds."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from castbench.text import read_encoder


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Fast tokenizer of a verified encoder folder."""
    read_encoder(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
