import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

from castbench.errors import InputError
from castbench.text.encoders import prefetch_encoder
from castbench.text.reading import LABELS, SPECIAL, Reader
from castbench.text.tokens import PackedTokens, tokenize_text
from small_study import MAX_TOKENS, TEXTS, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("reading") / "results")


@pytest.fixture(scope="module")
def encoder(study):
    return study.parent / "encoders" / "bert"


def test_tokens_are_those_of_the_cache(study, encoder):
    reader, packed = Reader.of(study / "tokens", encoder), PackedTokens.open(study / "tokens")
    texts = pq.read_table(study / "descriptions.parquet")["text"].to_pylist()
    for row, text in enumerate(texts):
        reading = reader.read(text)
        assert np.array_equal(reading.ids, packed[row])
        assert reading.n_full == packed.index()["n_tokens_full"][row].as_py()
    assert len(reader.read(texts[2]).ids) == MAX_TOKENS < reader.read(texts[2]).n_full


def test_every_token_knows_its_word_and_part(encoder):
    reading = Reader(encoder, 512, normalise=False).read(TEXTS[0])
    assert reading.words == ["[CLS]", *TEXTS[0].split(), "[SEP]"]
    assert len(reading.word) == len(reading.part) == len(reading.sentence) == len(reading.ids)
    by_word = dict(zip(reading.words, reading.part_of_word, strict=True))
    for word, label in {
        "[CLS]": "[CLS], [SEP]", "MgO": "formula", "Halite": "mineral", "Fm-3m": "symmetry",
        "MgO6": "coordination", "tilted.": "angles", "2.12": "bond lengths",
    }.items():  # fmt: skip
        assert LABELS[by_word[word]] == label, word
    pieces = np.bincount(reading.word)
    assert pieces[reading.words.index("MgO6")] == 4
    assert reading.sentence.tolist()[:1] == [-1] and reading.sentence.max() == 3
    assert reading.inner.tolist() == list(range(1, len(reading.ids) - 1))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """An encoder whose tokenizer cuts texts into bytes, and whose 64 positions begin behind two others."""
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator([TEXTS[0]] * 20, vocab_size=400, min_frequency=1, special_tokens=special)
    tokenizer.save_model(str(folder))
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    RobertaTokenizerFast(**files).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=400, max_position_embeddings=64, **sizes)
    RobertaModel(config).save_pretrained(folder)
    prefetch_encoder(f"{folder}@r1", folder / "encoder")
    return folder / "encoder"


def test_pieces_of_bytes_are_read_like_words(roberta, tmp_path):
    text = "MgO  crystallizes in the cubic Fm-3m space group.\n MgO is bonded."
    texts = [text, f" {text}", f"{text}\n"]  # as a source may give them
    descriptions = tmp_path / "descriptions.parquet"
    pq.write_table(pa.table({"material_id": list("abc"), "text": texts}), descriptions)
    tokenize_text({"max_tokens": 62}, descriptions, roberta, tmp_path / "tokens")
    packed, reader = PackedTokens.open(tmp_path / "tokens"), Reader.of(tmp_path / "tokens", roberta)
    for row, given in enumerate(texts):
        reading = reader.read(given)
        assert np.array_equal(reading.ids, packed[row])
        assert reading.words == ["<s>", *text.split(), "</s>"]
        assert reading.inner.tolist() == list(range(1, len(reading.ids) - 1))  # lone spaces too
    assert json.loads((roberta / "manifest.json").read_text())["positions"] == 62
    with pytest.raises(InputError, match="reads from 2 to 62"):
        tokenize_text({"max_tokens": 63}, descriptions, roberta, tmp_path / "tokens")


def test_weights_add_up(encoder):
    reading = Reader(encoder, 512, normalise=False).read(TEXTS[0])
    weights = np.random.default_rng(0).dirichlet(np.ones(len(reading.ids)), (2, 3))
    assert reading.by_word(weights).shape == (2, 3, len(reading.words))
    assert reading.by_word(weights).sum(-1) == pytest.approx(1)
    assert reading.by_part(weights).sum(-1) == pytest.approx(1)
    formula = reading.part == LABELS.index("formula")
    assert reading.by_part(weights)[0, 0, 0] == pytest.approx(weights[0, 0, formula].sum())
    assert reading.by_part(weights)[..., SPECIAL] == pytest.approx(weights[..., 0] + weights[..., -1])


def test_parts_are_found_in_the_text_that_the_tokenizer_saw(encoder):
    """Normalising changes lengths: an accent goes, a ligature becomes two signs."""
    text = (
        "MgO is Lazarevićite structured and crystallizes in the cubic Fm-3m space group. All Mg(1)-O(1) bond "
        "lengths are ﬀ 2.12 Å."
    )
    reading = Reader(encoder, 512, normalise=True).read(text)
    assert "Lazarevicite" in reading.words and "ff" in reading.words and "A." in reading.words
    by_word = dict(zip(reading.words, reading.part_of_word, strict=True))
    assert [LABELS[by_word[w]] for w in ("Lazarevicite", "Fm-3m", "2.12")] == [
        "mineral", "symmetry", "bond lengths",
    ]  # fmt: skip


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_without_text_there_is_cls_alone(encoder, text):
    reading = Reader(encoder, 512, normalise=False).read(text)
    assert reading.words == ["[CLS]"] and reading.n_full == 1 and not len(reading.inner)
