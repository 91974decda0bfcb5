import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

from castbench.evaluation.attention import (
    BATCH,
    cosine_similarities,
    effective_tokens,
    extract_attention,
    node_names,
    pick,
    stream_statistics,
)
from castbench.evaluation.trained import load_run
from castbench.provenance import write_json
from castbench.text.reading import LABELS
from castbench.training.dataset import Crystals
from small_study import SEEDS, TEST, TEXTS

SETTINGS = {"target": "band_gap", "material": None}
FILES = ("maps.json", "maps.safetensors", "similarity.parquet", "by_material.parquet")


def extract(study, encoder, output, settings=SETTINGS, runs=None):
    extract_attention(
        settings, runs or study / "runs", SEEDS, study / "materials.parquet",
        study / "splits" / "band_gap.json", study / "descriptions.parquet", study / "graphs",
        study / "tokens", encoder, output, study / "text_states" / "0",
    )  # fmt: skip
    return json.loads((output / "maps.json").read_text())


@pytest.fixture(scope="module")
def folder(study, encoder, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    extract(study, encoder, output)
    return output


@pytest.fixture(scope="module")
def maps(folder):
    return json.loads((folder / "maps.json").read_text())


def test_the_first_crystal_is_the_test_crystal_with_most_nodes_then_elements(maps):
    first = maps["materials"][0]
    assert (first["material_id"], first["formula"], first["split"]) == ("m-3", "Fm-3", "test")
    assert first["nodes"] == ["Mg1", "O1", "O2", "Al1"] and first["why"] == "most nodes"
    assert first["words"] == ["[CLS]", *TEXTS[1].split(), "[SEP]"]
    assert [LABELS[part] for part in first["parts"][:3]] == ["[CLS], [SEP]", "formula", "symmetry"]


def test_all_test_crystals_with_a_graph_are_shown_once_since_they_are_few(maps):
    shown = [entry["material_id"] for entry in maps["materials"]]
    assert sorted(shown) == TEST[:7]
    without_text = next(entry for entry in maps["materials"] if entry["material_id"] == "m-0")
    assert without_text["words"] == ["[CLS]"]


def test_every_row_of_a_map_sums_to_one(folder, maps):
    arrays = load_file(folder / "maps.safetensors")
    assert len(arrays) == 2 * 7
    for entry in maps["materials"]:
        for model in ("cast_scratch", "cast"):
            weights = arrays[f"{model}/{entry['material_id']}"]
            assert weights.shape == (2, 2, len(entry["nodes"]), len(entry["words"]))
            assert weights.sum(-1) == pytest.approx(1, abs=1e-5)
    assert arrays["cast/m-3"].std(axis=2).max() > 0, "nodes must not read all the same"


def test_statistics_are_those_of_each_crystal_alone(study, encoder, folder):
    model = load_run(study / "runs" / "band_gap" / "cast" / "1", encoder)
    crystals = Crystals(
        model, study / "graphs", study / "tokens", study / "text_states" / "0", torch.device("cpu")
    )
    frame = pd.read_parquet(folder / "by_material.parquet").query(
        "model == 'cast' and seed == 1 and layer == 2"
    )
    frame = frame.set_index("material_id")
    counts = pd.read_parquet(folder / "similarity.parquet").query(
        "model == 'cast' and seed == 1 and layer == 2 and head == -1"
    )
    every = []
    for material in TEST:
        rows, without_graph = crystals.rows([material])
        if without_graph:
            assert material not in frame.index
            continue
        with torch.no_grad():
            _, layers = model.attention_maps(crystals.batch(rows))
        heads = layers[1][0].double().numpy()  # second layer, (H, N, T)
        mean = heads.mean(0)
        found = frame.loc[material]
        entropy = -(mean * np.log(mean)).sum(1)
        assert found["effective_tokens"] == pytest.approx(np.exp(entropy).mean(), rel=1e-4)
        similar = [
            [rows[a] @ rows[b] / np.linalg.norm(rows[a]) / np.linalg.norm(rows[b])
             for a in range(len(mean)) for b in range(a)]
            for rows in (mean, *heads)
        ]  # fmt: skip
        every += similar[0]
        assert np.isnan(found["similarity"]) == (len(mean) == 1)
        if len(mean) > 1:
            assert found["similarity"] == pytest.approx(np.mean(similar[0]), abs=1e-5)
            assert found["similarity_heads"] == pytest.approx(np.mean(similar[1:]), abs=1e-5)
    assert counts["count"].sum() == len(every) == 1 + 6 + 6 + 3 + 1
    middles = np.repeat(counts["low"] + 0.0025, counts["count"])
    assert np.sort(middles) == pytest.approx(np.sort(every), abs=0.0026)


def test_every_layer_and_head_counts_every_pair(folder):
    counts = pd.read_parquet(folder / "similarity.parquet")
    counts = counts.groupby(["model", "seed", "layer", "head"])["count"].sum()
    assert len(counts) == 2 * 2 * 2 * 3 and (counts == 17).all()


def test_one_batch_of_maps_is_held_at_a_time(study, encoder, monkeypatch):
    """However many crystals are tested: here each a hundred times."""
    import castbench.evaluation.attention as module

    model = load_run(study / "runs" / "band_gap" / "cast" / "0", encoder)
    crystals = Crystals(
        model, study / "graphs", study / "tokens", study / "text_states" / "0", torch.device("cpu")
    )
    held, original = [], module.attention
    monkeypatch.setattr(module, "attention", lambda m, b: held.append(b.n) or original(m, b))

    class Writer:
        rows = 0

        def write_table(self, table):
            self.rows += len(table)

    writer, test = Writer(), torch.arange(7).repeat(100)
    histogram = stream_statistics("cast", 0, model, crystals, test, writer)
    assert max(held) <= BATCH and sum(held) == 700 and writer.rows == 1400
    assert (histogram.sum(axis=2) == 1700).all()


def test_a_chosen_crystal_may_be_outside_of_the_test_split(study, encoder, tmp_path):
    first = extract(study, encoder, tmp_path, SETTINGS | {"material": "m-8"})["materials"][0]
    assert (first["material_id"], first["split"], len(first["nodes"])) == ("m-8", "train", 5)
    assert first["why"] == "as configured"


@pytest.mark.parametrize(
    ("material", "reason"), [("nope", "is not in this data set"), ("m-7", "has no graph")]
)
def test_a_crystal_that_cannot_be_shown_is_left_out_with_a_note(
    study, encoder, folder, maps, tmp_path, caplog, material, reason
):
    found = extract(study, encoder, tmp_path, SETTINGS | {"material": material})
    assert found["note"].startswith(f"attention.material: {material} {reason}; ") and maps["note"] is None
    assert found["note"] in caplog.text and found["materials"] == maps["materials"]
    for name in FILES[1:]:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_runs_that_did_not_finish_are_left_out(study, encoder, tmp_path, caplog):
    for name, seed in ((name, seed) for name in ("cast_scratch", "cast") for seed in SEEDS):
        write_json(tmp_path / "runs" / "band_gap" / name / str(seed) / "metrics.json", {"status": "skipped"})
    maps = extract(study, encoder, tmp_path / "out", runs=tmp_path / "runs")
    assert maps["models"] == [] and maps["materials"] == []
    similarity = pd.read_parquet(tmp_path / "out" / "similarity.parquet")
    assert similarity.empty and list(similarity.columns) == ["model", "seed", "layer", "head", "low", "count"]
    assert pd.read_parquet(tmp_path / "out" / "by_material.parquet").empty
    assert "band_gap/cast/0: no finished run" in caplog.text


def test_maps_are_of_the_first_seed_that_finished(study, encoder, folder, maps, tmp_path):
    runs = shutil.copytree(study / "runs", tmp_path / "runs")
    write_json(runs / "band_gap" / "cast" / "0" / "metrics.json", {"status": "failed"})
    found = extract(study, encoder, tmp_path / "out", runs=runs)
    assert maps["seeds"] == {"cast_scratch": 0, "cast": 0}
    assert found["seeds"] == {"cast_scratch": 0, "cast": 1}
    frame = pd.read_parquet(tmp_path / "out" / "by_material.parquet")
    assert frame.groupby("model")["seed"].unique().map(list).to_dict() == {"cast": [1], "cast_scratch": SEEDS}
    before, after = (load_file(place / "maps.safetensors") for place in (folder, tmp_path / "out"))
    assert np.array_equal(before["cast_scratch/m-3"], after["cast_scratch/m-3"])
    assert not np.allclose(before["cast/m-3"], after["cast/m-3"])


def test_crystals_are_picked_by_their_mean_error_over_seeds(maps):
    errors = [np.random.default_rng(place).normal(size=8) for place in (2, 3)]  # of CAST, in the study
    mean = dict(zip(TEST, np.abs(errors).mean(axis=0), strict=True))
    why = {entry["why"]: entry["material_id"] for entry in maps["materials"]}
    left = {m: error for m, error in mean.items() if m not in ("m-7", why["most nodes"])}
    assert why["largest error of CAST"] == max(left, key=left.get)


def test_the_outputs_are_the_same_bytes_again(study, encoder, folder, tmp_path):
    extract(study, encoder, tmp_path)
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_picked_crystals_differ_and_say_why():
    n = 40
    facts = pd.DataFrame(
        {
            "nodes": range(n), "elements": 2, "tokens": np.arange(n)[::-1] * 30, "cut": np.arange(n) < 3,
            "spacegroup": 1 + np.arange(n) * 5, "cast": np.linspace(0, 1, n), "cast_scratch": 0.5,
            "structure_only": np.where(np.arange(n) == 7, 9.0, 0.2),
        },
        index=pd.Index([f"c{i}" for i in range(n)], name="material_id"),
    )  # fmt: skip
    chosen = pick(facts, "c20")
    ids = [entry["material_id"] for entry in chosen]
    assert len(ids) == len(set(ids)) == 12
    why = {entry["why"]: entry["material_id"] for entry in chosen}
    assert next(iter(why)) == "as configured" and why["most nodes"] == "c39"
    assert why["largest error of CAST"] == "c38" and why["smallest error of CAST"] == "c0"
    assert why["CAST better than coGN by most"] == "c7" and why["most truncated text"] == "c2"
    facts["structure_only"] = np.nan
    assert "CAST better than coGN by most" not in {entry["why"] for entry in pick(facts, None)}
    assert len(pick(facts[:3], None)) == 3


def test_equal_and_orthogonal_rows():
    weights = np.array([[[[1.0, 0.0], [0.5, 0.0], [0.0, 1.0]]]])
    assert cosine_similarities(weights).ravel() == pytest.approx([1, 0, 0])


def test_effective_tokens():
    even, one = np.full((1, 1, 2, 8), 1 / 8), np.eye(8)[None, None, :2]
    assert effective_tokens(even).ravel() == pytest.approx([8])
    assert effective_tokens(one).ravel() == pytest.approx([1])


def test_names():
    assert node_names([13, 52, 52, 52]) == ["Al1", "Te1", "Te2", "Te3"]


@pytest.mark.parametrize(
    ("why", "column", "value"),
    [
        ("CAST worse than coGN by most", "structure_only", -9.0),
        ("pretraining changes the error most", "cast_scratch", -9.0),
        ("shortest text", "tokens", 1),
        ("fewest nodes", "nodes", 1),
        ("lowest symmetry", "spacegroup", 1),
        ("highest symmetry", "spacegroup", 230),
    ],
)
def test_a_crystal_that_stands_out_is_picked_for_that(why, column, value):
    columns = {"nodes": 4, "elements": 2, "tokens": 90, "cut": False, "spacegroup": 100}
    columns |= {"cast": 0.5, "cast_scratch": 0.5, "structure_only": 0.5}
    facts = pd.DataFrame(columns, index=pd.Index([f"c{i}" for i in range(40)], name="material_id"))
    facts.loc["c39", column] = value  # the last one, which no tie takes
    assert {"material_id": "c39", "why": why} in pick(facts, None)
