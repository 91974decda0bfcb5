from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from castbench.errors import InputError
from castbench.text.states import PackedStates, embed_text
from castbench.text.tokenizer import load_tokenizer
from castbench.text.tokens import PackedTokens, tokenize_text

TEXTS = [
    "NaCl is rocksalt structured and crystallizes in the cubic Fm-3m space group.",
    None,
    "Na",
    "",
    "all bond lengths are 2 3 4 5 6 7 8 9",
    "Na",
]


def write_descriptions(path: Path, texts: list[str | None] = TEXTS, seconds: float = 1.0) -> Path:
    ids = [f"id-{i}" for i in range(len(texts))]
    columns = {"material_id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())}
    n = len(texts)
    pq.write_table(pa.table(columns | {"status": ["ok"] * n, "seconds": np.full(n, seconds)}), path)
    return path


@pytest.fixture(scope="module")
def tokens(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenize_text(
        {"max_tokens": 8}, write_descriptions(folder / "d.parquet"), encoder_folder, folder / "tokens"
    )
    return folder / "tokens"


def test_tokens_are_those_of_the_tokenizer(tokens: Path, encoder_folder: Path) -> None:
    packed = PackedTokens.open(tokens)
    tokenizer = load_tokenizer(encoder_folder)
    assert len(packed) == len(TEXTS)
    for text, ids in zip(TEXTS, packed, strict=True):
        expected = (
            tokenizer(text, truncation=True, max_length=8)["input_ids"] if text else [tokenizer.cls_token_id]
        )
        assert ids.tolist() == expected
    assert isinstance(packed.token_ids, np.memmap) and packed.token_ids.dtype == np.int32


def test_index_and_manifest(tokens: Path, encoder_folder: Path) -> None:
    packed = PackedTokens.open(tokens)
    tokenizer = load_tokenizer(encoder_folder)
    index = packed.index().to_pydict()
    full = [len(tokenizer(text)["input_ids"]) if text else 1 for text in TEXTS]
    assert index["material_id"] == [f"id-{i}" for i in range(6)]
    assert index["n_tokens_full"] == full and max(full) > 8
    assert index["n_tokens"] == [min(n, 8) for n in full] == np.diff(packed.token_offsets).tolist()
    assert index["has_text"] == [True, False, True, False, True, True]
    manifest = packed.manifest
    assert manifest["text_rate"] == pytest.approx(4 / 6)
    assert manifest["share_truncated"] == pytest.approx(sum(n > 8 for n in full) / 6)
    assert manifest["n_tokens_full_mean"] == pytest.approx(np.mean(full))
    assert manifest["n_tokens_full_std"] == pytest.approx(np.std(full))
    assert manifest["n_tokens"] == sum(min(n, 8) for n in full) == len(packed.token_ids)
    assert manifest["encoder"]["revision"] == "r1"


def test_the_same_texts_give_the_same_bytes(tokens: Path, encoder_folder: Path, tmp_path: Path) -> None:
    slower = write_descriptions(tmp_path / "d.parquet", seconds=9.0)
    tokenize_text({"max_tokens": 8}, slower, encoder_folder, tmp_path / "tokens")
    for path in (path for path in tokens.iterdir() if path.name != "cost.json"):  # seconds
        assert path.read_bytes() == (tmp_path / "tokens" / path.name).read_bytes(), path.name


def test_no_crystals(encoder_folder: Path, tmp_path: Path) -> None:
    tokenize_text(
        {"max_tokens": 8}, write_descriptions(tmp_path / "d.parquet", []), encoder_folder, tmp_path / "tokens"
    )
    embed_text(tmp_path / "tokens", encoder_folder, 0, tmp_path / "states", "cpu")
    assert len(PackedTokens.open(tmp_path / "tokens")) == 0
    assert PackedStates.open(tmp_path / "states").states.shape == (0, 32)


def test_matscibert_is_normalised(bert_folder: Path, tmp_path: Path) -> None:
    """Its id decides, so a random BERT under that id stands in for it."""
    import json

    from castbench.text import ENCODERS
    from castbench.text.encoders import prefetch_encoder

    prefetch_encoder(f"{bert_folder}@r1", tmp_path / "encoder")
    manifest = json.loads((tmp_path / "encoder" / "manifest.json").read_text())
    (tmp_path / "encoder" / "manifest.json").write_text(
        json.dumps(manifest | {"id": ENCODERS["matscibert"].id})
    )
    descriptions = write_descriptions(tmp_path / "d.parquet", ["Na₂ – 3m", "na2 - 3m"])
    tokenize_text({"max_tokens": 30}, descriptions, tmp_path / "encoder", tmp_path / "tokens")
    packed = PackedTokens.open(tmp_path / "tokens")
    assert packed[0].tolist() == packed[1].tolist()
    assert packed.manifest["normalise"] == "matscibert"


@pytest.mark.parametrize("max_tokens", [1, 65])
def test_a_limit_beyond_the_encoder_is_refused(encoder_folder: Path, tmp_path: Path, max_tokens: int) -> None:
    descriptions = write_descriptions(tmp_path / "d.parquet")
    with pytest.raises(InputError, match=f"max_tokens {max_tokens}: bert reads from 2 to 64"):
        tokenize_text({"max_tokens": max_tokens}, descriptions, encoder_folder, tmp_path / "tokens")


def test_unfinished_and_damaged_tokens_are_refused(tokens: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(InputError, match="run tokenize_text again"):
        PackedTokens.open(tmp_path)
    cut = shutil.copytree(tokens, tmp_path / "cut")
    (cut / "token_ids.npy").write_bytes((cut / "token_ids.npy").read_bytes()[:-4])
    with pytest.raises(InputError, match=r"token_ids\.npy: missing or cut short"):
        PackedTokens.open(cut)
