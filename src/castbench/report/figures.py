"""Every figure of the report, as SVG and PNG with the same bytes each time. Demo runs carry a watermark."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from castbench.evaluation.records import RESOURCES, ordered_models, ordered_targets, read_errors, read_json
from castbench.evaluation.statistics import (
    CRYSTAL_SYSTEMS,
    mean_baseline,
    read_crystals,
    read_split,
    read_values,
    site_groups,
    site_labels,
)
from castbench.labels import MODELS, TARGETS
from castbench.materials.splits import PARTS
from castbench.provenance import atomic_path
from castbench.report.tables import model_label, records

log = logging.getLogger(__name__)

INK, MUTED, RULE = "#1b1f24", "#6e7781", "#d8dee4"  # the report swaps these three in dark mode
PLACES = 9  # of a panel's place in the figure, which is 1 wide and high
SPLIT_COLOURS = {"train": "#9aa5b1", "validation": "#E69F00", "test": "#0072B2"}
STYLE: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "svg.hashsalt": "castbench",
    "svg.fonttype": "path",
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
}


@contextmanager
def drawing(settings: dict[str, Any], path: Path) -> Iterator[list[Figure]]:
    """Style for the figure that the block puts into the list; then write `path`.svg and `path`.png."""
    with plt.rc_context(STYLE):
        made: list[Figure] = []
        yield made
        (figure,) = made
        if settings["source"] == "demo":
            figure.text(
                0.5,
                0.5,
                "demo",
                fontsize=64,
                color=MUTED,
                alpha=0.10,
                ha="center",
                va="center",
                rotation=25,
                weight="bold",
                zorder=0,
            )
        lay_out(figure)
        for suffix, metadata in ((".svg", {"Date": None, "Creator": None}), (".png", {"Software": None})):
            with atomic_path(path.with_suffix(suffix)) as partial:
                figure.savefig(
                    partial,
                    format=suffix[1:],
                    metadata=metadata,
                    transparent=suffix == ".svg",
                )
        plt.close(figure)
        log.info("drew %s", path.name)


def lay_out(figure: Figure) -> None:
    """Lay the panels out once, not for each file.

    The last bits of the layout are not the same each time, and the names in an SVG are made of them.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        part.bbox_relative.set_points(part.bbox_relative.get_points().round(PLACES))
    for axis in figure.axes:
        axis.set_position(Bbox(axis.get_position(original=True).get_points().round(PLACES)))


def panels(count: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A grid of `count` panels, each of `size` inches; cells without a panel are empty."""
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(columns * size[0], lines * size[1]),
        squeeze=False,
        layout="constrained",
        **options,
    )
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def empty(axis: Axes, reason: str) -> None:
    """Say in a panel why nothing is drawn in it."""
    axis.text(0.5, 0.5, reason, transform=axis.transAxes, ha="center", va="center", color=MUTED)
    axis.set(xticks=[], yticks=[])


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], **options: Any) -> None:
    """One legend below the figure, in as many columns as its width has room for."""
    for columns in range(len(labels), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, **options)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def model_legend(figure: Figure, models: list[str]) -> None:
    """One legend of the models below the figure."""
    handles = [
        plt.Line2D([], [], color=MODELS[m].colour, marker="o", linestyle="", markersize=5) for m in models
    ]
    legend_below(figure, handles, [model_label(m) for m in models], handletextpad=0.1)


# --- the data -------------------------------------------------------------------------------------


def plot_dataset(settings: dict[str, Any], results: Path, output: Path) -> None:
    """Funnel, target histograms and token lengths. `settings` = {source, targets}."""
    _funnel(settings, results, output / "dataset_funnel")
    _histograms(settings, results, output / "target_histograms")
    _token_lengths(settings, results, output / "token_lengths")


def funnel_steps(funnel: dict[str, Any], target: str) -> list[tuple[str, int, int]]:
    """(step, removed, left) of a target's funnel, from the collected crystals on."""
    steps = [("collected", 0, funnel["n_collected"])]
    record = funnel["targets"].get(target, {"steps": []})
    return steps + [(s["filter"].replace("_", " "), s["removed"], s["left"]) for s in record["steps"]]


def _funnel(settings: dict[str, Any], results: Path, path: Path) -> None:
    funnel, targets = read_json(results / "funnel.json"), ordered_targets(settings)
    longest = max(len(funnel_steps(funnel, target)) for target in targets)
    with drawing(settings, path) as made:
        figure, axes = panels(len(targets), 2, (4.6, 0.55 + 0.23 * longest))
        made.append(figure)
        for axis, target in zip(axes, targets, strict=True):
            steps = funnel_steps(funnel, target)
            places = np.arange(len(steps))
            left = np.array([step[2] for step in steps])
            axis.barh(places, left, color="#0072B2", height=0.66)
            removed = np.array([step[1] for step in steps])
            axis.barh(places, removed, left=left, color=RULE, height=0.66)
            for place, (_, gone, kept) in enumerate(steps):
                label = f"{kept:,}" + (f"  (−{gone:,})" if gone else "")
                axis.annotate(
                    label,
                    (kept + gone, place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    size=7.5,
                )
            axis.set_yticks(places, [step[0] for step in steps])
            axis.invert_yaxis()
            axis.set(title=TARGETS[target].label, xlabel="crystals")
            axis.set_xlim(0, max(left[0], 1) * 1.25)
            axis.grid(axis="x")
            axis.tick_params(axis="y", length=0)


def _histograms(settings: dict[str, Any], results: Path, path: Path) -> None:
    targets = ordered_targets(settings)
    table = pd.read_csv(RESOURCES / "paper" / "table2.csv").query("split == 'train'")
    paper = {row["target"]: row for row in records(table)}
    with drawing(settings, path) as made:
        figure, axes = panels(len(targets), 2, (4.6, 2.5))
        made.append(figure)
        for axis, target in zip(axes, targets, strict=True):
            split, values = read_split(results, target), read_values(results, target)
            parts = [values.loc[split[part]].to_numpy() for part in PARTS]
            every = np.concatenate(parts)
            axis.set(title=TARGETS[target].label, xlabel=TARGETS[target].axis, ylabel="crystals")
            if not len(every):
                empty(axis, "too few crystals")
                continue
            bins = np.histogram_bin_edges(every, bins=30)
            colours = [SPLIT_COLOURS[part] for part in PARTS]
            axis.hist(parts, bins=list(bins), stacked=True, color=colours, label=[*PARTS])
            axis.locator_params(axis="y", integer=True)
            axis.grid(axis="y")
            axis.set_ylim(top=1.3 * axis.get_ylim()[1])
            ours = f"here {every.mean():.2f} ({every.std(ddof=1):.2f})" if len(every) > 1 else ""
            if target in paper:
                known = paper[target]
                axis.axvline(known["y_mean"], color=INK, linestyle=":", linewidth=1)
                ours += f"\npaper {known['y_mean']:.2f} ({known['y_std']:.2f})"
            axis.text(0.985, 0.97, ours, transform=axis.transAxes, ha="right", va="top", size=7.5, color=INK)
        handles, labels = next((a.get_legend_handles_labels() for a in axes if a.patches), ([], []))
        dotted = plt.Line2D([], [], color=INK, linestyle=":", linewidth=1)
        legend_below(figure, [*handles, dotted], [*labels, "paper's mean"])


def _token_lengths(settings: dict[str, Any], results: Path, path: Path) -> None:
    crystals = read_crystals(results)
    limit = read_json(results / "tokens" / "manifest.json")["max_tokens"]
    lengths = crystals.loc[crystals["has_text"], "n_tokens_full"].to_numpy()
    with drawing(settings, path) as made:
        figure, (axis,) = panels(1, 1, (7.0, 2.6))
        made.append(figure)
        bins = np.geomspace(max(lengths.min(), 1), max(lengths.max(), limit) * 1.1, 50)
        axis.hist(lengths, bins=list(bins), color="#E69F00")
        axis.axvline(limit, color=INK, linewidth=1)
        cut = (lengths > limit).mean()
        side = -1 if limit**2 > bins[0] * bins[-1] else 1  # of the line: where there is more room
        axis.annotate(
            f"limit {limit} tokens\n{cut:.1%} of {len(lengths):,} texts are cut",
            (limit, 1),
            xytext=(5 * side, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="top",
            size=7.5,
        )
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.xaxis.set_minor_formatter(matplotlib.ticker.LogFormatter())  # labels where a decade is missing
        axis.set_ylim(top=1.25 * axis.get_ylim()[1])
        axis.set(xlabel="length of the description before truncation (tokens)", ylabel="crystals")
        axis.locator_params(axis="y", integer=True)
        axis.grid(axis="y")


# --- the runs -------------------------------------------------------------------------------------


def plot_results(settings: dict[str, Any], results: Path, output: Path) -> None:
    """Per-seed points, learning curves, parity, errors by group, cost.

    `settings` = {source, targets, models, seeds}; `results` must hold `tables/runs.csv`.
    """
    runs = pd.read_csv(results / "tables" / "runs.csv")
    _seeds(settings, results, runs, output / "results_by_seed")
    _learning_curves(settings, results, runs, output / "learning_curves")
    _parity(settings, results, runs, output / "parity")
    crystals = read_crystals(results)
    sites = pd.Series(site_groups(crystals["n_sites"].to_numpy()), index=crystals.index)
    _by_group(
        settings, results, crystals["crystal_system"], CRYSTAL_SYSTEMS, output / "error_by_crystal_system"
    )
    _by_group(settings, results, sites, site_labels(), output / "error_by_sites")
    _cost(settings, runs, output / "cost")


def _seeds(settings: dict[str, Any], results: Path, runs: pd.DataFrame, path: Path) -> None:
    targets, models = ordered_targets(settings), ordered_models(settings)
    with drawing(settings, path) as made:
        figure, axes = panels(len(targets), 2, (4.4, 0.8 + 0.27 * len(models)), sharey=True)
        made.append(figure)
        for axis, target in zip(axes, targets, strict=True):
            chosen = runs[runs["target"] == target]
            axis.set_yticks(range(len(models)), [model_label(m) for m in models])
            axis.set(title=TARGETS[target].label, xlabel=f"test MAE ({TARGETS[target].unit})")
            axis.set_ylim(len(models) - 0.5, -0.5)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x")
            for place, model in enumerate(models):
                scores = chosen.loc[
                    (chosen["model"] == model) & (chosen["status"] == "finished"), "mae"
                ].to_numpy()
                colour = MODELS[model].colour
                axis.plot(scores, np.full(len(scores), place), "o", color=colour, markersize=5, alpha=0.75)
                if len(scores):
                    axis.plot([scores.mean()] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=1.8)
                missing = len(settings["seeds"]) - len(scores)
                if missing:
                    note = f"{missing} of {len(settings['seeds'])} runs missing"
                    where = axis.get_yaxis_transform()
                    axis.text(1.01, place, note, color=MUTED, va="center", transform=where, size=7)
            baseline = mean_baseline(results, target)
            if not math.isnan(baseline):
                axis.axvline(baseline, color=MUTED, linestyle="--", linewidth=0.9)
                axis.annotate(
                    "training mean",
                    (baseline, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(-3, -2),
                    textcoords="offset points",
                    rotation=90,
                    ha="right",
                    va="top",
                    size=6.5,
                    color=MUTED,
                )
            axis.set_xlim(left=0)


def _learning_curves(settings: dict[str, Any], results: Path, runs: pd.DataFrame, path: Path) -> None:
    targets, models = ordered_targets(settings), ordered_models(settings)
    finished = runs[runs["status"] == "finished"].set_index(["target", "model", "seed"])
    with drawing(settings, path) as made:
        figure, grid = plt.subplots(
            len(targets),
            len(models),
            figsize=(1.55 * len(models), 1.45 * len(targets)),
            squeeze=False,
            sharex="col",
            sharey="row",
            layout="constrained",
        )
        made.append(figure)
        for (line, target), (column, model) in product(enumerate(targets), enumerate(models)):
            axis = grid[line, column]
            drawn = False
            for seed in settings["seeds"]:
                if (target, model, seed) not in finished.index:
                    continue
                history = pd.read_csv(results / "runs" / target / model / str(seed) / "history.csv")
                axis.plot(history["epoch"], history["train_loss"], color=MUTED, linewidth=0.7, linestyle="--")
                axis.plot(
                    history["epoch"], history["validation_loss"], color=MODELS[model].colour, linewidth=1
                )
                best = history[history["epoch"] == finished.loc[(target, model, seed), "best_epoch"]]
                axis.plot(
                    best["epoch"], best["validation_loss"], "o", color=MODELS[model].colour, markersize=3.5
                )
                drawn = True
            if not drawn:
                axis.text(0.5, 0.5, "no run", transform=axis.transAxes, ha="center", va="center", color=MUTED)
            axis.set_yscale("log")
            axis.grid(visible=True)
            axis.tick_params(labelsize=6.5)
            axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            if line == 0:
                axis.set_title(model_label(model).replace(" (", "\n("), fontsize=7.5)
            if line == len(targets) - 1:
                axis.set_xlabel("epoch", fontsize=7.5)
            if column == 0:
                axis.set_ylabel(f"{TARGETS[target].label}\nloss (standardised)", fontsize=7)
        handles = [
            plt.Line2D([], [], color=MUTED, linestyle="--", linewidth=0.7),
            plt.Line2D([], [], color=INK, linewidth=1),
            plt.Line2D([], [], color=INK, marker="o", linestyle="", markersize=3.5),
        ]
        legend_below(figure, handles, ["training", "validation", "epoch selected"])


def _parity(settings: dict[str, Any], results: Path, runs: pd.DataFrame, path: Path) -> None:
    targets, models = ordered_targets(settings), ordered_models(settings)
    finished = set(runs[runs["status"] == "finished"].set_index(["target", "model", "seed"]).index)
    with drawing(settings, path) as made:
        figure, grid = plt.subplots(
            len(targets),
            len(models),
            figsize=(1.5 * len(models), 1.55 * len(targets)),
            squeeze=False,
            sharex="row",
            sharey="row",
            layout="constrained",
        )
        made.append(figure)
        for (line, target), (column, model) in product(enumerate(targets), enumerate(models)):
            axis = grid[line, column]
            frames = [
                pd.read_parquet(results / "runs" / target / model / str(seed) / "predictions.parquet")
                for seed in settings["seeds"]
                if (target, model, seed) in finished
            ]
            if frames:
                points = pd.concat(frames).query("split == 'test'")
                axis.plot(
                    points["y_true"],
                    points["y_pred"],
                    "o",
                    color=MODELS[model].colour,
                    alpha=0.45,
                    markersize=2.4,
                    markeredgewidth=0,
                    rasterized=len(points) > 2000,
                )
            else:
                axis.text(0.5, 0.5, "no run", transform=axis.transAxes, ha="center", va="center", color=MUTED)
            axis.axline((0, 0), slope=1, color=MUTED, linewidth=0.7, zorder=0)
            axis.grid(visible=True)
            axis.tick_params(labelsize=6.5)
            if line == 0:
                axis.set_title(model_label(model).replace(" (", "\n("), fontsize=7.5)
            if column == 0:
                axis.set_ylabel(f"{TARGETS[target].label}\npredicted ({TARGETS[target].unit})", fontsize=7)
            axis.set_xlabel(f"DFT ({TARGETS[target].unit})", fontsize=7)


def _by_group(
    settings: dict[str, Any], results: Path, groups: pd.Series, order: tuple[str, ...] | list[str], path: Path
) -> None:
    targets, models = ordered_targets(settings), ordered_models(settings)
    with drawing(settings, path) as made:
        figure, axes = panels(len(targets), 2, (4.8, 2.5))
        made.append(figure)
        for axis, target in zip(axes, targets, strict=True):
            tested = groups.loc[read_split(results, target)["test"]]
            counts = tested.value_counts().reindex(order).dropna().astype(int)
            axis.set(title=TARGETS[target].label, ylabel=f"test MAE ({TARGETS[target].unit})")
            if counts.empty:
                empty(axis, "too few crystals")
                continue
            for place, model in enumerate(models):
                errors = read_errors(results, target, model, settings["seeds"])
                if errors.empty:
                    continue
                by_group = errors.groupby(groups.loc[errors.index])
                mean, spread = by_group.mean().reindex(counts.index), by_group.sem().reindex(counts.index)
                places = np.arange(len(counts)) + (place - (len(models) - 1) / 2) * 0.1
                axis.errorbar(
                    places,
                    mean,
                    yerr=spread.fillna(0),
                    fmt="o",
                    markersize=3.6,
                    color=MODELS[model].colour,
                    elinewidth=0.9,
                )
            axis.set_xticks(range(len(counts)), [f"{name}\nn = {n:,}" for name, n in counts.items()], size=7)
            axis.set_xlim(-0.6, len(counts) - 0.4)
            axis.set_ylim(bottom=0)
            axis.grid(axis="y")
            axis.tick_params(axis="x", length=0)
        model_legend(figure, models)


def _cost(settings: dict[str, Any], runs: pd.DataFrame, path: Path) -> None:
    models = ordered_models(settings)
    finished = runs[runs["status"] == "finished"]
    measures = {
        "parameters_total": "parameters",
        "seconds": "time of a run (s)",
        "samples_per_second": "speed (training samples/s)",
        "peak_memory_mb": "peak memory (MB)",
    }
    with drawing(settings, path) as made:
        figure, axes = panels(len(measures), 4, (2.6, 0.8 + 0.27 * len(models)), sharey=True)
        made.append(figure)
        for axis, (column, label) in zip(axes, measures.items(), strict=True):
            axis.set(xlabel=label)
            for place, model in enumerate(models):
                chosen = finished[finished["model"] == model].dropna(subset=column)
                colour = MODELS[model].colour
                if chosen.empty:
                    where = axis.get_yaxis_transform()
                    axis.text(0.03, place, "no run", color=MUTED, va="center", transform=where, size=7)
                elif column == "parameters_total":
                    ends = [chosen["parameters_trainable"].max(), chosen["parameters_total"].max()]
                    axis.plot(ends, [place, place], color=RULE, linewidth=2.5, zorder=1)
                    axis.plot(ends[1], place, "o", color=MUTED, markersize=5, markerfacecolor="none")
                    axis.plot(ends[0], place, "o", color=colour, markersize=5)
                else:
                    axis.barh(place, chosen[column].mean(), color=colour, height=0.6)
                    axis.plot(
                        chosen[column], [place] * len(chosen), "o", color=INK, markersize=1.8, alpha=0.6
                    )
            axis.grid(axis="x")
            axis.set_yticks(range(len(models)), [model_label(m) for m in models])
            axis.set_ylim(len(models) - 0.5, -0.5)
            axis.tick_params(axis="y", length=0)
        if len(finished):
            axes[0].set_xscale("log")
