"""A tiny BERT with random weights and a vocabulary of its own."""

from pathlib import Path

import pytest

WORDS = """
    na cl mg o te al is rock ##salt structured and crystal ##lizes in the cubic fm - 3m space group . ,
    bonded to six equivalent atoms form a mixture of edge corner sharing octahedra ##s ##1 ##2 ##3
    1 2 3 4 5 6 7 8 9 0 + / ( ) # ##m fm3m all bond lengths are perovskite sr ti ##o ##ti
""".split()  # noqa: SIM905


def make_encoder(folder: Path, n_layers: int = 3) -> Path:
    """Write a random BERT (d = 32, 4 heads) as a local Hugging Face folder with model.safetensors."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=n_layers, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local folder as a user would have it."""
    return make_encoder(tmp_path_factory.mktemp("hub") / "bert")


@pytest.fixture(scope="session")
def encoder_folder(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same encoder, fetched."""
    from castbench.text.encoders import prefetch_encoder

    output = tmp_path_factory.mktemp("encoders") / "bert"
    prefetch_encoder(f"{bert_folder}@r1", output)
    return output
