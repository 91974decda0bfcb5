import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
from PIL import Image

from castbench.labels import MODELS
from castbench.materials.splits import write_split
from castbench.report.figures import (
    PLACES,
    funnel_steps,
    lay_out,
    panels,
    plot_dataset,
    plot_results,
    site_groups,
)

NAMES = {
    "dataset_funnel", "target_histograms", "token_lengths", "results_by_seed", "learning_curves", "parity",
    "error_by_crystal_system", "error_by_sites", "cost",
    "attention_maps", "attention_heads", "attention_similarity",
    "text_attention", "attention_by_part", "text_changes", "deletion_curves",
}  # fmt: skip


def test_every_figure_is_there_as_svg_and_png_and_has_a_caption(results, root):
    files = {file.name for file in (results / "figures").iterdir()}
    assert files == {f"{name}.{suffix}" for name in NAMES for suffix in ("svg", "png")}
    for name in NAMES:
        assert ET.parse(results / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        image = np.asarray(Image.open(results / "figures" / f"{name}.png").convert("L"))
        assert image.std() > 5, f"{name} is blank"
        assert (root / "workflow" / "report" / f"{name}.rst").read_text().strip()


def test_figures_are_the_same_bytes_again_and_only_a_demo_is_watermarked(results, settings, tmp_path):
    plot_dataset(settings, results, tmp_path / "demo")
    plot_dataset(settings | {"source": "local"}, results, tmp_path / "own")
    for file in (tmp_path / "demo").iterdir():
        assert file.read_bytes() == (results / "figures" / file.name).read_bytes(), file.name
        assert file.read_bytes() != (tmp_path / "own" / file.name).read_bytes()
    assert "<!-- demo -->" in (tmp_path / "demo" / "token_lengths.svg").read_text()
    assert "<!-- demo -->" not in (tmp_path / "own" / "token_lengths.svg").read_text()


def test_panels_have_places_without_the_bits_that_differ_each_time():
    figure, axes = panels(3, 2, (3.0, 2.0))
    for axis in axes:
        axis.set(title="title", xlabel="label")
    figure.colorbar(axes[0].imshow(np.eye(3)), ax=axes)
    lay_out(figure)
    for axis in figure.axes:
        place = axis.get_position(original=True)
        assert place.width > 0.01 and place.height > 0.01
        assert (place.get_points() == place.get_points().round(PLACES)).all()


def test_models_have_the_palette(results, settings):
    svg = (results / "figures" / "results_by_seed.svg").read_text().lower()
    assert all(MODELS[model].colour.lower() in svg for model in settings["models"])


def test_gaps_are_said(results, settings, tmp_path):
    """A failed run, a model without any, and a target with too few crystals."""
    copy = shutil.copytree(results, tmp_path / "results")
    write_split(copy / "splits" / "band_gap.json", {"target": "band_gap"}, {}, "too few")
    runs = pd.read_csv(copy / "tables" / "runs.csv")
    runs.loc[(runs["model"] == "cast") & (runs["seed"] == 1), ["status", "mae"]] = ["failed", np.nan]
    runs.loc[runs["model"] == "multimat", ["status", "mae"]] = ["missing", np.nan]
    runs.loc[runs["target"] == "band_gap", ["status", "mae"]] = ["skipped", np.nan]
    runs.to_csv(copy / "tables" / "runs.csv", index=False)
    for gone in ("total_energy/multimat", "band_gap"):
        shutil.rmtree(copy / "runs" / gone)
    plot_dataset(settings, copy, copy / "figures")
    plot_results(settings, copy, copy / "figures")
    svg = {file.stem: file.read_text() for file in (copy / "figures").glob("*.svg")}
    assert "<!-- 1 of 2 runs missing -->" in svg["results_by_seed"]
    assert "<!-- 2 of 2 runs missing -->" in svg["results_by_seed"]
    assert "<!-- no run -->" in svg["parity"] and "<!-- no run -->" in svg["learning_curves"]
    assert "<!-- too few crystals -->" in svg["target_histograms"]
    assert "<!-- too few crystals -->" in svg["error_by_sites"]


def test_groups_of_sites():
    assert list(site_groups(np.array([1, 2, 3, 4, 5, 32, 33]))) == [
        "1",
        "2",
        "3–4",
        "3–4",
        "5–8",
        "17–32",
        "> 32",
    ]


def test_the_funnel_starts_with_what_was_collected():
    funnel = {
        "n_collected": 9,
        "targets": {"band_gap": {"steps": [{"filter": "a_b", "removed": 2, "left": 7}]}},
    }
    assert funnel_steps(funnel, "band_gap") == [("collected", 0, 9), ("a b", 2, 7)]
    assert funnel_steps(funnel, "total_energy") == [("collected", 0, 9)]
