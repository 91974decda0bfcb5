"""The tokenizer of a text encoder, without the model, whose import takes seconds."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import set_verbosity_error

from castbench.text import read_encoder

# No advice in the logs, nor a table of the head that an encoder lacks: `load_encoder` checks what matters.
set_verbosity_error()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Fast tokenizer of a verified encoder folder."""
    read_encoder(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
