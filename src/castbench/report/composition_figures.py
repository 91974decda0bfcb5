"""Figures of the composition study: the EDM report's seven, calibration, and the screening."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from castbench import config
from castbench.compositions.targets import threshold_text
from castbench.evaluation.records import ordered_composition_models, read_edm_report, read_json
from castbench.labels import CLASS_TARGETS, COMPOSITION_MODELS, TARGETS
from castbench.materials.splits import PARTS
from castbench.report.figures import INK, MUTED, RULE, drawing, empty, legend_below, panels

OURS = "edm_transformer"
LOSSES = ("edm_cross_entropy", "edm_alpha_report", "edm_transformer")
STABLE, UNSTABLE = "#0072B2", "#E69F00"
POOLS = {"in_window": "inside the windows of t and tau", "allowed": "all that is chemically allowed"}


def plot_compositions(settings: dict[str, Any], results: Path, output: Path) -> None:
    """Draw every figure of the composition study.

    Args:
        settings: {source, models, structure_models, regression, classification, seeds, ...}.
        results: folder of the data set, with its tables.
        output: folder of the figures.
    """
    _class_balance(settings, results, output / "class_balance")
    _edm(settings, results, output / "edm_heatmap")
    _confusion(settings, results, output / "confusion")
    _parity(settings, results, output / "composition_parity")
    _curves(settings, results, output / "composition_curves")
    _epochs(settings, results, output / "composition_epochs")
    _attention(settings, results, output / "composition_attention")
    _reliability(settings, results, output / "reliability")
    _hidden(settings, results, output / "hidden_compounds")


def label(model: str) -> str:
    """A model's name in figures and tables."""
    return "EDM report" if model == "edm_report" else COMPOSITION_MODELS[model].label


def stability_rule(settings: dict[str, Any]) -> str:
    """The rule of the stable class, for titles."""
    return threshold_text("stability", settings["classification"]["stability"])


def _run(results: Path, model: str, seed: int) -> Path:
    return results / "composition_runs" / model / str(seed)


def _stability(settings: dict[str, Any], results: Path, model: str) -> list[dict[str, Any]]:
    """Scores of the class stable, of the finished runs of a model."""
    records = (read_json(_run(results, model, seed) / "metrics.json") for seed in settings["seeds"])
    return [found for record in records if (found := record.get("scores", {}).get("stability"))]


def _history(results: Path, model: str, seed: int) -> pd.DataFrame | None:
    file = _run(results, model, seed) / "history.csv"
    history = pd.read_csv(file) if file.exists() else pd.DataFrame()
    return None if history.empty else history


def focal_curve(p: np.ndarray, alpha: float, gamma: float) -> np.ndarray:
    """Loss of an example whose true class has probability `p` (n,)."""
    return -alpha * (1 - p) ** gamma * np.log(p)


def _class_balance(settings: dict[str, Any], results: Path, path: Path) -> None:
    split = read_json(results / "splits" / "compositions.json")
    classes = {part: split["classes"][part] for part in PARTS}
    target = CLASS_TARGETS["stability"]
    with drawing(settings, path) as made:
        figure, axes = panels(3, 3, (3.4, 3.0))
        made.append(figure)
        parts = list(classes)
        bottom = np.zeros(len(parts))
        for name, colour in ((target.negative, UNSTABLE), (target.positive, STABLE)):
            counts = np.array([classes[part][name] for part in parts])
            axes[0].bar(parts, counts, bottom=bottom, color=colour, label=name, width=0.6)
            for place, (count, base) in enumerate(zip(counts, bottom, strict=True)):
                if count > 0.04 * sum(sum(c.values()) for c in classes.values()):
                    middle = base + count / 2
                    axes[0].text(
                        place, middle, f"{count:,}", ha="center", va="center", color="white", size=7.5
                    )
            bottom = bottom + counts
        for place, part in enumerate(parts):
            share = classes[part][target.positive] / bottom[place]
            axes[0].text(place, bottom[place], f"{share:.0%} stable", ha="center", va="bottom", size=7.5)
        axes[0].set(title=f"Formulas by class\n({stability_rule(settings)})", ylabel="formulas")
        axes[0].set_ylim(top=1.22 * bottom.max())
        axes[0].legend(loc="upper right")
        p = np.linspace(0.01, 1, 300)
        axes[1].plot(p, focal_curve(p, 1, 0), color=INK, label="cross-entropy")
        axes[1].plot(p, focal_curve(p, 1, 2), color="#D55E00", label="focal, gamma 2")
        axes[1].plot(p, focal_curve(p, 0.75, 2), color="#D55E00", linestyle="--", label="… times alpha 0.75")
        axes[1].plot(p, focal_curve(p, 0.25, 2), color="#D55E00", linestyle=":", label="… times alpha 0.25")
        axes[1].set(
            title="Loss of one example", xlabel="probability given to its class", ylabel="loss (nats)"
        )
        axes[1].set_ylim(0, 4)
        axes[1].grid(visible=True)
        axes[1].legend()
        _recalls(settings, results, axes[2])


def _recalls(settings: dict[str, Any], results: Path, axis: Axes) -> None:
    """Recall of both classes at probability 0.5, by loss: what the loss does to the balance."""
    models = [model for model in LOSSES if model in settings["models"]]
    for place, model in enumerate(models):
        for shift, name, colour in ((-0.14, "negative", UNSTABLE), (0.14, "positive", STABLE)):
            runs = _stability(settings, results, model)
            values = [run["test"]["at_half"]["recall"][name] for run in runs]
            axis.plot([place + shift] * len(values), values, "o", color=colour, markersize=4, alpha=0.7)
            if values:
                axis.plot(
                    place + shift + np.array([-0.1, 0.1]), [np.mean(values)] * 2, color=colour, linewidth=2
                )
    names = [label(model).removeprefix("EDM, ").replace("focal, ", "focal,\n") for model in models]
    axis.set_xticks(range(len(models)), names, size=7.5)
    axis.set(
        title="Recall on test at probability 0.5\n(a point a seed, line: mean)",
        ylabel="recall",
        ylim=(0, 1.02),
    )
    axis.set_xlim(-0.5, len(models) - 0.5)
    axis.grid(axis="y")


def _edm(settings: dict[str, Any], results: Path, path: Path) -> None:
    found = read_json(results / "attention" / "compositions.json")["edm"]
    matrix = np.array(found["matrix"])
    blocks = (
        ("mat2vec (200)", 0, 200),
        ("properties (10)", 200, 210),
        ("fraction: linear (86)", 210, 296),
        ("log (86)", 296, 382),
        ("sqrt (84)", 382, 466),
    )
    with drawing(settings, path) as made:
        figure, (axis,) = panels(1, 1, (10.5, 2.5))
        made.append(figure)
        image = axis.imshow(
            matrix, aspect="auto", cmap="viridis", vmin=-2.5, vmax=2.5, interpolation="nearest"
        )
        for name, start, end in blocks:
            axis.axvline(end - 0.5, color="white", linewidth=1.2)
            if end - start > 20:
                axis.text((start + end) / 2, -0.62, name, ha="center", va="bottom", size=7.5)
            else:
                axis.annotate(
                    name, ((start + end) / 2, -0.5), xytext=(0, 16), textcoords="offset points", ha="center",
                    size=7.5, arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7},
                )  # fmt: skip
        axis.set_yticks(range(len(found["slots"])), found["slots"])
        axis.set(xlabel="feature of the element descriptor matrix")
        axis.set_title(f"{found['formula']}: {matrix.shape[0]} slots of {matrix.shape[1]} features", pad=32)
        axis.tick_params(length=0)
        bar = figure.colorbar(image, ax=axis, pad=0.01, extend="both")
        bar.set_label("value (standardised)")


def _confusion(settings: dict[str, Any], results: Path, path: Path) -> None:
    chosen = [
        (model, cut) for model in LOSSES if model in settings["models"] for cut in ("at_half", "at_threshold")
    ]
    report = read_edm_report()
    with drawing(settings, path) as made:
        figure, axes = panels(len(chosen) + 1, 4, (2.6, 2.6))
        made.append(figure)
        for axis, (model, cut) in zip(axes, chosen, strict=False):
            runs = _stability(settings, results, model)
            if not runs:
                empty(axis, "no run")
                continue
            counts = np.mean([run["test"][cut]["confusion"] for run in runs], axis=0)
            cuts = "0.5" if cut == "at_half" else f"{np.mean([run['threshold'] for run in runs]):.2f}*"
            _matrix(axis, counts, f"{label(model).removeprefix('EDM, ')}\nstable from {cuts}")
        names = ("true_negatives", "false_positives", "false_negatives", "true_positives")
        _matrix(
            axes[-1],
            np.array([report[name] for name in names]).reshape(2, 2),
            "the EDM report\n(its own rows)",
        )
        figure.supxlabel(
            f"{stability_rule(settings)}; test formulas, mean over seeds. * chosen on validation",
            size=8,
        )


def _matrix(axis: Axes, counts: np.ndarray, title: str) -> None:
    """A confusion matrix [[TN, FP], [FN, TP]] with shares of each true class."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (line, column), share in np.ndenumerate(shares):
        count = float(counts[line, column])
        text = f"{count:,.0f}\n{share:.0%}" if count.is_integer() else f"{count:,.1f}\n{share:.0%}"
        colour = "white" if share > 0.55 else "#1b1f25"
        axis.text(column, line, text, ha="center", va="center", color=colour, size=8.5)
    axis.set_xticks([0, 1], ["unstable", "stable"])
    axis.set_yticks([0, 1], ["unstable", "stable"], rotation=90, va="center")
    axis.set_xlabel("predicted", fontsize=7.5)
    axis.set_ylabel("true", fontsize=7.5)
    axis.set_title(title, fontsize=8.5)
    axis.tick_params(length=0)


def _structure_points(results: Path, model: str, seeds: list[int]) -> pd.DataFrame:
    frames = []
    for seed in seeds:
        file = results / "runs" / "band_gap" / model / str(seed) / "predictions.parquet"
        if file.exists():
            frames.append(pd.read_parquet(file).rename(columns={"y_true": "true", "y_pred": "pred"}))
    return pd.concat(frames).query("split == 'test'")[["true", "pred"]] if frames else pd.DataFrame()


def _points(settings: dict[str, Any], results: Path, model: str, target: str) -> pd.DataFrame:
    """True and predicted values of a number on test, all seeds."""
    if model in settings["structure_models"]:
        return (
            _structure_points(results, model, settings["seeds"]) if target == "band_gap" else pd.DataFrame()
        )
    frames = []
    for seed in settings["seeds"]:
        file = _run(results, model, seed) / "predictions.parquet"
        if file.exists():
            frame = pd.read_parquet(file).query("split == 'test'")
            frames.append(frame.rename(columns={f"{target}_true": "true", f"{target}_pred": "pred"}))
    return pd.concat(frames)[["true", "pred"]].dropna() if frames else pd.DataFrame()


def _parity(settings: dict[str, Any], results: Path, path: Path) -> None:
    models = [model for model in ordered_composition_models(settings) if model != "baseline"]
    cells = [(target, model) for target in settings["regression"] for model in models]
    with drawing(settings, path) as made:
        figure, axes = panels(len(cells), 4, (2.75, 2.75))
        made.append(figure)
        for axis, (target, model) in zip(axes, cells, strict=True):
            points = _points(settings, results, model, target)
            unit = TARGETS[target].unit
            axis.set_title(label(model).replace(", alpha", ",\nalpha"), fontsize=8.5)
            if points.empty:
                empty(axis, "no run")
                continue
            axis.plot(
                points["true"], points["pred"], "o", color=COMPOSITION_MODELS[model].colour, markersize=2.6,
                markeredgewidth=0, alpha=0.4, rasterized=len(points) > 2000,
            )  # fmt: skip
            low = min(points.min().min(), 0)
            high = points.max().max()
            axis.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle="--", zorder=0)
            error = (points["pred"] - points["true"]).abs().mean()
            axis.text(0.04, 0.96, f"MAE {error:.3f} {unit}", transform=axis.transAxes, va="top", size=7.5)
            axis.set_xlabel(f"DFT {TARGETS[target].label.lower()} ({unit})", fontsize=7.5)
            axis.set_ylabel(f"predicted ({unit})", fontsize=7.5)
            axis.grid(visible=True)
            axis.set_aspect("equal")


def _curves(settings: dict[str, Any], results: Path, path: Path) -> None:
    models = [m for m in settings["models"] if config.COMPOSITION_MODELS[m][1]]
    with drawing(settings, path) as made:
        figure, axes = panels(len(models), 4, (2.8, 2.4))
        made.append(figure)
        for axis, model in zip(axes, models, strict=True):
            drawn = False
            for seed in settings["seeds"]:
                history = _history(results, model, seed)
                if history is None:
                    continue
                best = read_json(_run(results, model, seed) / "metrics.json").get("best_epoch")
                axis.plot(history["epoch"], history["train_loss"], color=STABLE, linewidth=0.9)
                axis.plot(history["epoch"], history["validation_loss"], color=UNSTABLE, linewidth=0.9)
                chosen = history[history["epoch"] == best]
                axis.plot(chosen["epoch"], chosen["validation_loss"], "o", color=UNSTABLE, markersize=4)
                drawn = True
            axis.set_title(label(model).replace(", alpha", ",\nalpha"), fontsize=8.5)
            if not drawn:
                empty(axis, "no run")
                continue
            axis.set(xlabel="epoch", ylabel="loss (sum over targets)")
            axis.set_ylim(bottom=0)
            axis.grid(visible=True)
        lines = [plt.Line2D([], [], color=colour) for colour in (STABLE, UNSTABLE)]
        legend_below(figure, lines, ["training", "validation (point: kept weights)"])


def _epochs(settings: dict[str, Any], results: Path, path: Path) -> None:
    target = settings["regression"][0]
    unit = TARGETS[target].unit
    kinds = [("mae", f"MAE ({unit})"), ("rmse", f"RMSE ({unit})"), ("r2", "R²")]
    histories = [_history(results, OURS, seed) for seed in settings["seeds"]]
    with drawing(settings, path) as made:
        figure, axes = panels(len(kinds), 3, (3.3, 2.6))
        made.append(figure)
        for axis, (kind, name) in zip(axes, kinds, strict=True):
            for part, colour in (("train", STABLE), ("validation", UNSTABLE)):
                column = f"{part}_{target}_{kind}"
                own = [h.set_index("epoch")[column] for h in histories if h is not None and column in h]
                for values in own:
                    axis.plot(values.index, values, color=colour, linewidth=0.6, alpha=0.5)
                if own:
                    mean = pd.concat(own, axis=1).dropna().mean(axis=1)
                    axis.plot(
                        mean.index, mean, color=colour, linewidth=1.6, label=f"{part} (mean over seeds)"
                    )
            axis.set(title=f"{TARGETS[target].label}: {name}", xlabel="epoch", ylabel=name)
            if kind == "r2":
                axis.set_ylim(max(-0.5, axis.get_ylim()[0]), 1)
            else:
                axis.set_ylim(bottom=0)
            axis.grid(visible=True)
        legend_below(figure, *axes[0].get_legend_handles_labels())


def attention_by_token(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the heads of one layer look at from [CLS], in the report's two senses.

    Args:
        weights: (heads, queries, keys), [CLS] first.

    Returns:
        Mean weight (keys,) over the heads, which sums to 1; and the number of heads (keys,) that look at a
        token most. The report's table of "average attention" (5, 1, 2 and 4 of 12) is the latter.
    """
    from_cls = weights[:, 0]
    return from_cls.mean(axis=0), np.bincount(from_cls.argmax(axis=1), minlength=weights.shape[2])


def _attention(settings: dict[str, Any], results: Path, path: Path) -> None:
    found = read_json(results / "attention" / "compositions.json")["attention"]
    tokens, seed = found["tokens"], next(iter(found["seeds"]))
    layers = np.array(found["seeds"][seed])
    weights = layers[-1]
    lines = -(-len(weights) // 4)
    with drawing(settings, path) as made, plt.rc_context({"axes.titlesize": 8}):
        figure = plt.figure(figsize=(10.5, 2.05 * lines + 2.7), layout="constrained")
        made.append(figure)
        parts: Any = figure.subfigures(2, 1, height_ratios=[2.05 * lines, 2.7])
        above, below = parts
        image = None
        for head, axis in enumerate(above.subplots(lines, 4, squeeze=False).flat):
            if head >= len(weights):
                axis.set_visible(False)
                continue
            image = _map(axis, weights[head], tokens, f"head {head + 1}")
        average, means, counts = below.subplots(1, 3)
        image = _map(average, weights.mean(axis=0), tokens, "mean of the weights over heads")
        figure.colorbar(image, ax=average, label="attention weight", pad=0.02)
        places, share = np.arange(len(tokens)), 0.8 / len(found["seeds"])
        for number, (name, own) in enumerate(found["seeds"].items()):
            mean, top = attention_by_token(np.array(own)[-1])
            at = places - 0.4 + share * (number + 0.5)
            alpha = 1 - 0.5 * number / len(found["seeds"])
            means.bar(at, mean, width=share, color="#0072B2", alpha=alpha, label=f"seed {name}")
            counts.bar(at, top, width=share, color="#D55E00", alpha=alpha, label=f"seed {name}")
        means.set(title="[CLS] row: mean weight over heads", ylabel="attention weight")
        counts.set(title="[CLS] row: heads whose top token it is", ylabel=f"heads of {len(weights)}")
        for axis in (means, counts):
            axis.set_xticks(places, tokens)
            axis.set_ylim(top=1.25 * axis.get_ylim()[1])
            axis.grid(axis="y")
            axis.tick_params(axis="x", length=0)
            axis.legend(ncols=len(found["seeds"]), loc="upper right")
        above.suptitle(
            f"{found['formula']}: self-attention in layer {len(layers)} of {len(layers)}, seed {seed} "
            "(rows: query, columns: key)",
            size=9.5,
            weight="bold",
        )


def _map(axis: Axes, weights: np.ndarray, tokens: list[str], title: str) -> Any:
    """Attention of queries (rows) to keys (columns); rows of padding are grey."""
    padded = np.array([token == "[PAD]" for token in tokens])
    shown = np.where(padded[:, None], np.nan, weights)
    axis.set_facecolor(RULE)
    image = axis.imshow(shown, cmap="viridis", vmin=0, vmax=1)
    axis.set_xticks(range(len(tokens)), tokens, size=7)
    axis.set_yticks(range(len(tokens)), tokens, size=7)
    axis.set_title(title)
    axis.tick_params(length=0)
    return image


def _reliability(settings: dict[str, Any], results: Path, path: Path) -> None:
    models = [m for m in settings["models"] if m != "baseline"]
    table = pd.read_csv(results / "tables" / "composition_calibration.csv")
    with drawing(settings, path) as made:
        figure, axes = panels(len(models), 3, (3.3, 3.0))
        made.append(figure)
        for axis, model in zip(axes, models, strict=True):
            own = table[(table["model"] == model) & (table["n"] > 0)]
            axis.set_title(label(model).replace(", alpha", ",\nalpha"), fontsize=8.5)
            if own.empty:
                empty(axis, "no run")
                continue
            axis.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle="--")
            colour = COMPOSITION_MODELS[model].colour
            for _, group in own.groupby("seed"):
                axis.plot(group["probability"], group["share"], color=colour, linewidth=0.7, alpha=0.5)
            sums = own.assign(p=own["probability"] * own["n"], s=own["share"] * own["n"]).groupby("bin").sum()
            axis.scatter(sums["p"] / sums["n"], sums["s"] / sums["n"], s=8 + 90 * sums["n"] / sums["n"].sum(), color=colour, zorder=3)  # fmt: skip # noqa: E501
            runs = _stability(settings, results, model)
            for run in runs:
                axis.axvline(run["threshold"], color=INK, linewidth=0.8, linestyle=":")
            ece = np.mean([run["test"]["calibration"]["ece"] for run in runs])
            brier = np.mean([run["test"]["calibration"]["brier"] for run in runs])
            axis.text(
                0.03, 0.97, f"ECE {ece:.3f}\nBrier {brier:.3f}", transform=axis.transAxes, va="top", size=7.5
            )
            axis.set(xlabel="predicted probability of stable", ylabel="share that is stable")
            axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
            axis.grid(visible=True)
        figure.supxlabel(
            f"{stability_rule(settings)}. Dotted: threshold chosen on validation, one a seed", size=8
        )


def _hidden(settings: dict[str, Any], results: Path, path: Path) -> None:
    found = read_json(results / "screening" / "validation.json")
    with drawing(settings, path) as made:
        figure, axes = panels(len(POOLS), 2, (4.6, 3.5))
        made.append(figure)
        for axis, (name, words) in zip(axes, POOLS.items(), strict=True):
            pool = found["pools"][name]
            axis.set_title(f"Among {pool['n']:,} candidates: {words}", fontsize=8.5)
            if not pool["n_hidden"]:
                empty(axis, "no hidden stable compound among them")
                continue
            axis.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle="--", label="chance")
            for seed in (name for name in map(str, settings["seeds"]) if name in pool):
                curve = pool[seed]["curve"]
                axis.plot(curve["looked_at"], curve["found"], color="#CC79A7", linewidth=0.8, alpha=0.6)
            curve = pool["mean"]["curve"]
            axis.plot(
                curve["looked_at"], curve["found"], color="#CC79A7", linewidth=2, label="mean of the seeds"
            )
            lines = [
                f"first {row['share']:.0%}: {row['hits']} of {pool['n_hidden']}, {row['factor']:.1f} × chance"
                for row in pool["mean"]["enrichment"]
            ]
            axis.text(0.97, 0.06, "\n".join(lines), transform=axis.transAxes, ha="right", size=7.5)
            axis.set(xlabel="share of the list looked at", ylabel="hidden stable compounds found")
            axis.set(xlim=(0, 1), ylim=(0, 1.02))
            axis.grid(visible=True)
            axis.legend(loc="upper left")
        figure.supxlabel(
            f"{stability_rule(settings)}; {found['n_hidden_stable']} hidden from training", size=8
        )
