import shutil
import xml.etree.ElementTree as ET
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from castbench.evaluation.statistics import mean_baseline, read_values
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


@pytest.fixture
def drawn(monkeypatch):
    """Figures by name, kept instead of written: what their axes hold can be asked."""
    figures = {}

    @contextmanager
    def keep(settings, path):
        made = []
        yield made
        figures[path.name] = made[0]

    monkeypatch.setattr("castbench.report.figures.drawing", keep)
    yield figures
    for figure in figures.values():
        plt.close(figure)


def xy(line):
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def test_points_and_curves_are_those_of_the_runs(results, settings, drawn, tmp_path):
    plot_results(settings, results, tmp_path)
    seeds, last = settings["seeds"], len(settings["models"]) - 1  # CAST, the first target
    folder = results / "runs" / "total_energy" / "cast"
    frames = [pd.read_parquet(folder / str(seed) / "predictions.parquet") for seed in seeds]
    tested = pd.concat(frames).query("split == 'test'")
    points = xy(drawn["parity"].axes[last].lines[0])
    assert np.array_equal(points, tested[["y_true", "y_pred"]].to_numpy().T)

    lines = drawn["learning_curves"].axes[last].lines
    history = pd.read_csv(folder / "0" / "history.csv")
    assert np.array_equal(xy(lines[0]), history[["epoch", "train_loss"]].to_numpy().T)
    assert np.array_equal(xy(lines[1]), history[["epoch", "validation_loss"]].to_numpy().T)
    best = history[history["epoch"] == 3]
    assert np.array_equal(xy(lines[2]), best[["epoch", "validation_loss"]].to_numpy().T)

    lines = drawn["results_by_seed"].axes[0].lines
    scores, mean = lines[2 * last], lines[2 * last + 1]
    assert xy(scores)[0] == pytest.approx([0.6, 0.61]) and set(xy(scores)[1]) == {last}
    assert xy(mean)[0] == pytest.approx([0.605, 0.605])
    assert xy(lines[-1])[0] == pytest.approx(mean_baseline(results, "total_energy"))

    _, seconds, speed, memory = drawn["cost"].axes[:4]
    for axis, value in ((seconds, 12.5), (speed, 300), (memory, 900)):
        assert [bar.get_width() for bar in axis.patches] == [value] * (last + 1)
    ends = drawn["cost"].axes[0].lines[0]
    assert xy(ends)[0].tolist() == [600_000, 700_000]


def test_errors_by_group_are_means_over_its_test_crystals(results, settings, drawn, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    for file in (copy / "runs" / "total_energy" / "cast").glob("*/predictions.parquet"):
        frame = pd.read_parquet(file)
        error = frame["material_id"].str.removeprefix("m-").astype(int) / 100
        frame.assign(y_pred=frame["y_true"] + error).to_parquet(file)
    plot_results(settings, copy, tmp_path)
    axis = drawn["error_by_crystal_system"].axes[0]
    names = [label.get_text() for label in axis.get_xticklabels()]
    assert names == ["triclinic\nn = 9", "trigonal\nn = 9"]
    points, _, (bars,) = axis.containers[-1]
    for place, rest in enumerate((8, 9)):  # the test crystals, by their last digit
        errors = np.arange(rest, 90, 10) / 100
        assert points.get_ydata()[place] == pytest.approx(errors.mean())
        low, high = bars.get_segments()[place][:, 1]
        assert high - low == pytest.approx(2 * errors.std(ddof=1) / 3)


def test_the_data_are_drawn_as_they_are(results, settings, drawn, tmp_path):
    plot_dataset(settings, results, tmp_path)
    bars = drawn["dataset_funnel"].axes[1].patches  # of the gap, which each fifth crystal lacks
    assert [(bar.get_x(), bar.get_width()) for bar in bars[:3]] == [(0, 90), (0, 90), (0, 72)]
    assert [(bar.get_x(), bar.get_width()) for bar in bars[3:]] == [(90, 0), (90, 0), (72, 18)]
    axis = drawn["target_histograms"].axes[0]
    energies = read_values(results, "total_energy")
    here = f"here {energies.mean():.2f} ({energies.std():.2f})"
    assert axis.texts[0].get_text() == f"{here}\npaper -9.14 (7.22)"
    assert axis.lines[0].get_xdata()[0] == pytest.approx(-9.14, abs=5e-3)
    tops = {patch.get_y() + patch.get_height() for patch in axis.patches}
    assert max(tops) == np.histogram(energies, bins=30)[0].max()
    axis = drawn["token_lengths"].axes[0]
    assert "limit 512 tokens\n42.7% of 89 texts are cut" in axis.texts[0].get_text()  # one has no text
    assert sum(patch.get_height() for patch in axis.patches) == 89
    assert axis.lines[0].get_xdata()[0] == 512
