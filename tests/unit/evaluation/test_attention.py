import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from castbench.errors import InputError
from castbench.evaluation import attention
from castbench.evaluation.attention import cosine_similarities, extract_attention, join_pieces, node_names
from castbench.graphs.neighbours import CrystalGraph
from castbench.graphs.packed import PackedWriter
from castbench.models import build_model
from castbench.provenance import sha256_file, write_json
from castbench.text.encoders import prefetch_encoder
from castbench.text.states import embed_text
from castbench.text.tokens import tokenize_text
from castbench.training.dataset import Crystals

NODES = [
    1,
    2,
    4,
    4,
    3,
    1,
    2,
    3,
    5,
    2,
]  # the fourth has more elements than the third; the ninth is not in test
TEST = [f"m-{i}" for i in range(8)]
ARCHITECTURE = {
    "cogn": {"width": 8, "depth": 1},
    "cross_attention": {
        "text": "frozen", "layers": 2, "heads": 2, "width": 8, "feedforward": 16, "dropout": 0.1,
    },
}  # fmt: skip
SETTINGS = {"target": "band_gap", "material": None}


def write_text(root, ids):
    """A random BERT with word pieces, tokens and states; the first crystal has no text."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    bert = root / "bert"
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "is",
        "cubic",
        "mg",
        "##o",
        "al",
        "##te",
        "##3",
    ]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)
    BertModel(config).save_pretrained(bert)
    (bert / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(bert / "vocab.txt")).save_pretrained(bert)
    texts = [None, *(["MgO is cubic", "AlTe3 is cubic AlTe3"] * 5)][: len(ids)]
    pq.write_table(pa.table({"material_id": ids, "text": texts}), root / "descriptions.parquet")
    prefetch_encoder(str(bert), root / "encoder")
    tokenize_text({"max_tokens": 16}, root / "descriptions.parquet", root / "encoder", root / "tokens")
    embed_text(root / "tokens", root / "encoder", 0, root / "states")


def write_graphs(root, ids):
    rng = np.random.default_rng(1)
    graphs = []
    for row, n in enumerate(NODES):
        elements = np.array([8] * n if row == 2 else [12, 8, 8, 13, 1][:n], np.uint8)
        source, target = (rng.integers(0, n, 6).astype(np.int32) for _ in range(2))
        ones = np.ones(6, np.float32)
        distances = rng.uniform(2, 5, 6).astype(np.float32)
        graphs.append(
            CrystalGraph(elements, np.ones(n, np.float32), source, np.sort(target), distances, ones, 1)
        )
    graphs[7] = "two atoms are in one place"
    with PackedWriter(root / "graphs", {"neighbours": 24}, sha256_file(root / "materials.parquet")) as writer:
        writer.append(ids, graphs)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten crystals, and runs of CAST that were not trained."""
    root = tmp_path_factory.mktemp("attention")
    torch.manual_seed(0)
    ids = [f"m-{i}" for i in range(len(NODES))]
    pq.write_table(
        pa.table({"material_id": ids, "formula": [f"F{i}" for i in ids]}), root / "materials.parquet"
    )
    split = {"train": ids[8:], "validation": [], "test": TEST}
    write_json(root / "split.json", split)
    write_graphs(root, ids)
    write_text(root, ids)
    for name in ("cast_scratch", "cast"):
        run = root / "runs" / "band_gap" / name / "0"
        write_json(run / "metrics.json", {"status": "finished"})
        write_json(run / "config.json", {"architecture": ARCHITECTURE})
        model = build_model(name, ARCHITECTURE, root / "encoder")
        save_file(
            {key: value.contiguous() for key, value in model.trained_state().items()},
            run / "model.safetensors",
        )
    return root


def extract(data, output, settings=SETTINGS, runs=None):
    extract_attention(
        settings, runs or data / "runs", 0, data / "materials.parquet", data / "split.json", data / "graphs",
        data / "tokens", data / "encoder", output, data / "states",
    )  # fmt: skip
    return json.loads((output / "maps.json").read_text()), pd.read_parquet(output / "similarity.parquet")


@pytest.fixture(scope="module")
def extracted(data, tmp_path_factory):
    return extract(data, tmp_path_factory.mktemp("out"))


def test_the_crystal_is_the_test_crystal_with_most_nodes_then_elements(extracted):
    maps, _ = extracted
    assert (maps["material_id"], maps["formula"], maps["split"]) == ("m-3", "Fm-3", "test")
    assert maps["nodes"] == ["Mg1", "O1", "O2", "Al1"]


def test_tokens_are_readable_and_every_row_of_a_map_sums_to_one(extracted):
    maps, _ = extracted
    assert maps["pieces"] == ["[CLS]", "mg", "##o", "is", "cubic", "[SEP]"]
    assert maps["words"] == ["[CLS]", "mgo", "is", "cubic", "[SEP]"]
    assert maps["word_of_piece"] == [0, 1, 1, 2, 3, 4]
    for name in ("cast_scratch", "cast"):
        weights = np.array(maps["models"][name])
        assert weights.shape == (2, 2, 4, 6)
        assert weights.sum(-1) == pytest.approx(1, abs=1e-4)
        assert weights.std(axis=2).max() > 0, "nodes must not read all the same"


def test_similarities_are_those_of_each_crystal_alone(data, extracted):
    maps, similarity = extracted
    model = attention._load("cast", data / "runs" / "band_gap" / "cast" / "0", data / "encoder")
    crystals = Crystals(model, data / "graphs", data / "tokens", data / "states", torch.device("cpu"))
    expected = []
    for material in TEST:
        rows, without_graph = crystals.rows([material])
        if without_graph:
            continue
        with torch.no_grad():
            _, layers = model.attention_maps(crystals.batch(rows))
        mean = layers[1][0].mean(0).numpy()  # second layer, (N, T)
        for a in range(len(mean)):
            for b in range(a):
                expected.append(mean[a] @ mean[b] / np.linalg.norm(mean[a]) / np.linalg.norm(mean[b]))
    summary = maps["similarity"]["cast"]
    assert summary["pairs"] == len(expected) == 1 + 6 + 6 + 3 + 1
    assert (summary["crystals"], summary["one_node"]) == (5, 2)
    assert summary["mean_by_layer"][1] == pytest.approx(np.mean(expected), abs=1e-4)
    chosen = similarity.query("model == 'cast' and layer == 2 and head == -1")
    assert chosen["count"].sum() == len(expected)
    middles = np.repeat(chosen["low"] + 0.0025, chosen["count"])
    assert np.sort(middles) == pytest.approx(np.sort(expected), abs=0.0026)


def test_every_layer_and_head_counts_every_pair(extracted):
    _, similarity = extracted
    counts = similarity.groupby(["model", "layer", "head"])["count"].sum()
    assert len(counts) == 2 * 2 * 3 and (counts == 17).all()


def test_a_chosen_crystal_may_be_outside_of_the_test_split(data, tmp_path):
    maps, _ = extract(data, tmp_path, SETTINGS | {"material": "m-8"})
    assert (maps["material_id"], maps["split"], len(maps["nodes"])) == ("m-8", "train", 5)


@pytest.mark.parametrize(
    ("material", "reason"), [("nope", "is not in this data set"), ("m-7", "has no graph")]
)
def test_a_crystal_that_cannot_be_shown(data, tmp_path, material, reason):
    with pytest.raises(InputError, match=f"^attention.material: {material} {reason}; .*$"):
        extract(data, tmp_path, SETTINGS | {"material": material})


def test_runs_that_did_not_finish_are_left_out(data, tmp_path, caplog):
    for name in ("cast_scratch", "cast"):
        write_json(tmp_path / "runs" / "band_gap" / name / "0" / "metrics.json", {"status": "skipped"})
    maps, similarity = extract(data, tmp_path / "out", runs=tmp_path / "runs")
    assert maps["models"] == {} and similarity.empty
    assert list(similarity.columns) == ["model", "layer", "head", "low", "count"]
    assert "band_gap/cast/0: no finished run" in caplog.text


def test_the_outputs_are_the_same_bytes_again(data, extracted, tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    extract(data, first), extract(data, second)
    for name in ("maps.json", "similarity.parquet"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_equal_and_orthogonal_rows():
    weights = np.array([[[[1.0, 0.0], [0.5, 0.0], [0.0, 1.0]]]])
    assert cosine_similarities(weights).ravel() == pytest.approx([1, 0, 0])


def test_names():
    assert node_names([13, 52, 52, 52]) == ["Al1", "Te1", "Te2", "Te3"]
    assert join_pieces(["##x", "a", "##b", "##c", "d"]) == (["##x", "abc", "d"], [0, 1, 1, 1, 2])
