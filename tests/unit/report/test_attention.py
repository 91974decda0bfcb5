import base64
import json
import shutil
import zlib

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save

from castbench.evaluation.evidence import COLUMNS
from castbench.labels import MODELS
from castbench.provenance import write_json
from castbench.report import attention
from castbench.report.attention import (
    browser_maps,
    browser_text,
    embed_json,
    fifth_layers,
    plot_attention,
    plot_evidence,
    quantised,
    read_maps,
)
from castbench.report.figures import model_legend


def unpack(packed):
    """As attention.js does."""
    content = zlib.decompress(base64.b64decode(packed["data"]))
    weights = packed["top"] * (np.frombuffer(content, np.uint8) / 255) ** 2
    return weights.reshape(packed["shape"])


def test_packed_weights_keep_two_digits_of_small_ones():
    weights = np.random.default_rng(0).dirichlet(np.full(60, 0.3), (2, 4, 8, 3)).astype(np.float32)
    found = unpack(quantised(weights))
    assert found.shape == weights.shape
    assert np.abs(found - weights).max() < 0.004 * weights.max()
    large = weights > 0.01 * weights.max()
    assert (np.abs(found - weights) / weights)[large].max() < 0.05
    assert not unpack(quantised(np.zeros((1, 2)))).any()


def test_maps_of_the_browser_are_those_of_the_files(results):
    maps = read_maps(results)
    packed = browser_maps(maps)
    assert [row["label"] for row in packed["rows"]] == ["CAST without pretraining", "CAST with pretraining"]
    for entry, shown in zip(maps["materials"], packed["materials"], strict=True):
        assert shown["nodes"] == entry["nodes"] and shown["words"] == entry["words"]
        weights = unpack(shown)
        assert weights[1] == pytest.approx(entry["maps"]["cast"], abs=0.005)
        assert weights.sum(-1) == pytest.approx(1, abs=0.03)


def test_a_large_payload_loses_nodes_and_says_so(results, monkeypatch, caplog):
    rng = np.random.default_rng(0)
    maps = read_maps(results)
    for entry in maps["materials"]:
        entry["nodes"] = [f"O{i}" for i in range(40)]
        entry["maps"] = {m: rng.dirichlet(np.ones(8), (2, 4, 40)) for m in maps["models"]}
    assert browser_maps(maps)["materials"][0]["shape"][3] == 32
    monkeypatch.setattr(attention, "MAX_PAYLOAD", 5_000)
    packed = browser_maps(maps)
    assert sum(len(entry["data"]) for entry in packed["materials"]) <= 5_000
    assert packed["materials"][0]["shape"][3] < 32 and packed["materials"][0]["all_nodes"] == 40
    assert len(packed["materials"][0]["nodes"]) == packed["materials"][0]["shape"][3]
    assert "fewer nodes" in caplog.text


def test_the_fifth_layer_has_two_readings_where_the_encoder_has_them(results):
    assert [fifth_layers(n) for n in (12, 6, 5, 2)] == [[4, 5], [4, 5], [4], [1]]
    text = json.loads((results / "attention" / "text.json").read_text())
    packed = browser_text(text)
    assert packed["layers"] == [4, 5] and packed["shape"] == [6, 3, 8]
    assert unpack(packed) == pytest.approx(np.array(text["weights"]), abs=0.005)


def test_nothing_ends_the_script_that_holds_the_data():
    content = {"words": ["</script><script>alert(1)</script>", "<!-- x"]}
    text = embed_json(content)
    assert "</script" not in text and "<!--" not in text and json.loads(text) == content


@pytest.mark.parametrize("inches", [2.0, 4.8, 12.0])
def test_a_legend_is_within_its_figure(inches):
    figure = plt.figure(figsize=(inches, 2), layout="constrained")
    model_legend(figure, list(MODELS))
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width
    assert [text.get_text() for text in legend.get_texts()] == [model.label for model in MODELS.values()]
    plt.close(figure)


def test_figures_without_any_run(settings, results, tmp_path):
    copy = shutil.copytree(results / "attention", tmp_path / "attention").parent
    maps = {"labels": [], "models": [], "materials": [], "target": "band_gap", "seeds": {}, "note": None}
    write_json(copy / "attention" / "maps.json", maps)
    (copy / "attention" / "maps.safetensors").write_bytes(save({}))
    columns = ["model", "seed", "layer", "head", "low", "count"]
    pd.DataFrame(columns=columns).to_parquet(copy / "attention" / "similarity.parquet")
    (copy / "tables").mkdir()
    pd.DataFrame(columns=list(COLUMNS)).to_csv(copy / "tables" / "evidence.csv", index=False)
    plot_attention(settings, copy, copy / "figures")
    plot_evidence(settings, copy, copy / "figures")
    svg = {file.stem: file.read_text() for file in (copy / "figures").glob("*.svg")}
    assert len(svg) == 7
    assert "<!-- no finished run of CAST -->" in svg["attention_heads"]
    assert "<!-- no finished run of a model that reads text -->" in svg["deletion_curves"]


def test_figures_are_the_same_bytes_again(settings, results, tmp_path):
    plot_evidence(settings, results, tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (results / "figures" / file.name).read_bytes(), file.name
