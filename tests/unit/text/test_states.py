from pathlib import Path

import numpy as np
import pytest
import torch

from castbench.errors import InputError
from castbench.text import states as module
from castbench.text.encoders import load_encoder, prefetch_encoder
from castbench.text.states import PackedStates, embed_text
from castbench.text.tokens import PackedTokens, tokenize_text
from unit.text.conftest import make_encoder
from unit.text.test_tokens import TEXTS, write_descriptions


@pytest.fixture(scope="module")
def tokens(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenize_text(
        {"max_tokens": 30}, write_descriptions(folder / "d.parquet"), encoder_folder, folder / "tokens"
    )
    return folder / "tokens"


def numbers(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("remaining", [0, 2, 3])
def test_states_are_the_encoders_hidden_states(
    tokens: Path, encoder_folder: Path, tmp_path: Path, remaining: int
) -> None:
    embed_text(tokens, encoder_folder, remaining, tmp_path, "cpu")
    packed, cached = PackedTokens.open(tokens), PackedStates.open(tmp_path, tokens)
    assert cached.states.dtype == np.uint16 and isinstance(cached.states, np.memmap)
    model = load_encoder(encoder_folder)
    for text in range(len(packed)):
        ids = torch.from_numpy(packed[text].astype(np.int64))[None]
        with torch.no_grad():
            expected = model(ids, output_hidden_states=True).hidden_states[3 - remaining][0].numpy()
        bits = cached.states[packed.token_offsets[text] : packed.token_offsets[text + 1]]
        np.testing.assert_allclose(numbers(bits), expected, rtol=2**-8, atol=1e-5)


def test_equal_texts_are_encoded_once(tokens: Path, encoder_folder: Path, tmp_path: Path) -> None:
    embed_text(tokens, encoder_folder, 0, tmp_path, "cpu")
    cached = PackedStates.open(tmp_path)
    offsets = PackedTokens.open(tokens).token_offsets
    assert cached.manifest["n_texts"] == len({text or "" for text in TEXTS}) == 4
    assert np.array_equal(cached.states[offsets[2] : offsets[3]], cached.states[offsets[5] : offsets[6]])


def test_batch_size_changes_nothing(
    tokens: Path, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_text(tokens, encoder_folder, 0, tmp_path / "large", "cpu")
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    embed_text(tokens, encoder_folder, 0, tmp_path / "small", "cpu")
    large, small = (PackedStates.open(tmp_path / name).states for name in ("large", "small"))
    np.testing.assert_allclose(numbers(large), numbers(small), rtol=2**-7, atol=1e-5)


def test_bad_input(tokens: Path, encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="4 layers cannot remain; the encoder has 3"):
        embed_text(tokens, encoder_folder, 4, tmp_path / "states", "cpu")
    prefetch_encoder(f"{make_encoder(tmp_path / 'other', n_layers=1)}@r2", tmp_path / "encoder")
    with pytest.raises(InputError, match="tokens of another encoder"):
        embed_text(tokens, tmp_path / "encoder", 0, tmp_path / "states", "cpu")
    assert not (tmp_path / "states").exists()


def test_states_of_other_tokens_are_refused(tokens: Path, encoder_folder: Path, tmp_path: Path) -> None:
    embed_text(tokens, encoder_folder, 0, tmp_path / "states", "cpu")
    descriptions = write_descriptions(tmp_path / "d.parquet", ["Cl"])
    tokenize_text({"max_tokens": 30}, descriptions, encoder_folder, tmp_path / "tokens")
    with pytest.raises(InputError, match="states of other tokens"):
        PackedStates.open(tmp_path / "states", tmp_path / "tokens")
    (tmp_path / "states" / "states.npy").write_bytes(b"short")
    with pytest.raises(InputError, match="missing or cut short"):
        PackedStates.open(tmp_path / "states")


def test_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_encoder(tmp_path / "hot", n_layers=1)
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.output.LayerNorm.weight"] *= 1e39
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    prefetch_encoder(f"{folder}@r1", tmp_path / "encoder")
    tokenize_text(
        {"max_tokens": 8},
        write_descriptions(tmp_path / "d.parquet"),
        tmp_path / "encoder",
        tmp_path / "tokens",
    )
    with pytest.raises(InputError, match="states are not finite"):
        embed_text(tmp_path / "tokens", tmp_path / "encoder", 0, tmp_path / "states", "cpu")
    with pytest.raises(InputError, match="run embed_text again"):
        PackedStates.open(tmp_path / "states")
