"""What the models look at: the figures, and the data that the report draws its interactive views from."""

import base64
import json
import logging
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle
from safetensors.numpy import load_file

from castbench.evaluation.evidence import CHANGES, ORDERS
from castbench.evaluation.records import read_json
from castbench.evaluation.statistics import FEWEST
from castbench.labels import MODELS
from castbench.report.figures import INK, MUTED, drawing, empty, legend_below, model_legend, panels
from castbench.report.tables import model_label
from castbench.text.parts import PARTS

log = logging.getLogger(__name__)

BINS = 200  # of `similarity.parquet`
MAX_WORDS = 90  # of a printed map
MAX_PAYLOAD = 3_000_000  # bytes of base64 in the report
NODES = (32, 16, 8, 4)  # nodes that a drawn map keeps: the first number with which the payload fits
ROLES = (("cast_scratch", "CAST without pretraining"), ("cast", "CAST with pretraining"))
ORDER_NAMES = {
    "attended": "most attended first", "attributed": "largest gradients first", "random": "at random",
}  # fmt: skip
# Paul Tol's "light" scheme, dark enough for a label of its own; the last is [CLS] and [SEP].
PART_COLOURS = (
    "#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#DDDDDD", "#AAAAAA",
)  # fmt: skip


def plot_attention(settings: dict[str, Any], results: Path, output: Path) -> None:
    """The paper's Figures 2 and 3. `settings` = {source}; `results` must hold `attention/`."""
    maps = read_maps(results)
    similarity = pd.read_parquet(results / "attention" / "similarity.parquet")
    for name, function in {"attention_maps": _maps, "attention_heads": _heads}.items():
        if maps["models"]:
            function(settings, maps, output / name)
        else:
            _nothing(settings, "no finished run of CAST", output / name)
    if len(similarity):
        _similarity(settings, similarity, output / "attention_similarity")
    else:
        _nothing(settings, "no test crystal of two or more nodes", output / "attention_similarity")


def plot_evidence(settings: dict[str, Any], results: Path, output: Path) -> None:
    """The text encoder's [CLS], parts of a text, other texts, deletion curves.

    `settings` = {source, models}; `results` must hold attention/text.json and tables/evidence.csv.
    """
    text = read_json(results / "attention" / "text.json")
    if "weights" in text:
        _text(settings, text, output / "text_attention")
    else:
        _nothing(settings, text["note"], output / "text_attention")
    evidence = read_evidence(results)
    models = [m for m in MODELS if m in set(evidence.loc[evidence["measure"] == "change", "model"])]
    for name, function in {
        "attention_by_part": _by_part,
        "text_changes": _changes,
        "deletion_curves": _deletions,
    }.items():
        if models:
            function(settings, evidence, models, output / name)
        else:
            _nothing(settings, "no finished run of a model that reads text", output / name)


def read_maps(results: Path) -> dict[str, Any]:
    """maps.json; each of its `materials` with `maps`, model to attention (layers, heads, nodes, words)."""
    maps = read_json(results / "attention" / "maps.json")
    if maps:
        arrays = load_file(results / "attention" / "maps.safetensors")
        for entry in maps["materials"]:
            entry["maps"] = {model: arrays[f"{model}/{entry['material_id']}"] for model in maps["models"]}
    return maps


def read_evidence(results: Path) -> pd.DataFrame:
    """evidence.csv; `about` as text."""
    return pd.read_csv(results / "tables" / "evidence.csv", dtype={"about": str, "unit": str})


def _nothing(settings: dict[str, Any], reason: str, path: Path) -> None:
    with drawing(settings, path) as made:
        figure, (axis,) = panels(1, 1, (5.0, 1.2))
        made.append(figure)
        empty(axis, reason)


# --- for the browser ---------------------------------------------------------------------------------


def browser_maps(maps: dict[str, Any], rows: dict[str, tuple[str, str]] | None = None) -> dict[str, Any]:
    """The maps as the report embeds them, at most `MAX_PAYLOAD` bytes of base64 in all.

    `rows` are label and colour of each model; by default those of CAST without and with pretraining.

    A weight w is the byte 255 sqrt(w / top), `top` being the crystal's largest: small weights keep digits.
    Bytes are in the order model, layer, head, node, word, compressed as zlib does.
    """
    for nodes in NODES:
        materials = [_pack(entry, maps["models"], nodes) for entry in maps["materials"]]
        if sum(len(entry["data"]) for entry in materials) <= MAX_PAYLOAD:
            break
        log.warning("attention maps are cut to fewer nodes, to keep the report small")
    rows = rows or {model: (role, MODELS[model].colour) for model, role in ROLES}
    return {
        "labels": maps["labels"],
        "colours": PART_COLOURS,
        "rows": [{"label": rows[m][0], "colour": rows[m][1]} for m in maps["models"]],
        "materials": materials,
    }


def _pack(entry: dict[str, Any], models: list[str], nodes: int) -> dict[str, Any]:
    weights = np.stack([entry["maps"][model][:, :, :nodes] for model in models])
    kept = {key: value for key, value in entry.items() if key != "maps"}
    return kept | quantised(weights) | {"nodes": entry["nodes"][:nodes], "all_nodes": len(entry["nodes"])}


def quantised(weights: np.ndarray) -> dict[str, Any]:
    """Shape, largest value and bytes of weights; see `browser_maps`."""
    top = float(weights.max()) or 1.0
    content = np.rint(255 * np.sqrt(weights / top)).astype(np.uint8).tobytes()
    limit = float(np.quantile(weights, 0.995)) or top
    data = base64.b64encode(zlib.compress(content, 9)).decode()
    return {"shape": list(weights.shape), "top": top, "limit": limit, "data": data}


def browser_text(text: dict[str, Any]) -> dict[str, Any]:
    """The attention of [CLS], likewise: layer, head, word."""
    kept = {key: text[key] for key in ("material_id", "formula", "words", "parts", "labels")}
    weights = np.array(text["weights"], dtype=np.float32)
    return kept | quantised(weights) | {"colours": PART_COLOURS, "layers": fifth_layers(len(weights))}


def fifth_layers(layers: int) -> list[int]:
    """Indices of what "5th layer" may mean, counted from 1 and from 0, as far as the encoder has them."""
    return [layer for layer in (4, 5) if layer < layers] or [layers - 1]


# --- figures -----------------------------------------------------------------------------------------


def _shared_limit(values: list[np.ndarray]) -> float:
    """Upper end of a colour scale that all maps share: a single extreme cell does not darken the rest."""
    return float(np.quantile(np.concatenate([v.ravel() for v in values]), 0.995)) or 1.0


def _ruler(axis: Axes, parts: list[int], labels: list[str]) -> None:
    """A strip that says which part of the description each word belongs to."""
    axis.set(xlim=(-0.5, len(parts) - 0.5), ylim=(0, 1), yticks=[])
    axis.spines[:].set_visible(False)
    start = 0
    for place in range(1, len(parts) + 1):
        if place == len(parts) or parts[place] != parts[start]:
            width = place - start
            axis.add_patch(Rectangle((start - 0.5, 0), width, 1, color=PART_COLOURS[parts[start]], lw=0))
            name = labels[parts[start]]
            if width >= 0.5 * len(name) and parts[start] < len(PARTS):
                middle = start + width / 2 - 0.5
                axis.text(middle, 0.45, name, ha="center", va="center", size=6, color="#1b1f25")
            start = place
    axis.tick_params(length=0)


def _maps(settings: dict[str, Any], maps: dict[str, Any], path: Path) -> None:
    entry = maps["materials"][0]
    present = [(model, role) for model, role in ROLES if model in maps["models"]]
    # The mean over heads: at word level a map is readable, and the heads have a figure of their own.
    weights = {model: entry["maps"][model].mean(axis=1)[..., :MAX_WORDS] for model, _ in present}
    words, parts = entry["words"][:MAX_WORDS], entry["parts"][:MAX_WORDS]
    layers, nodes, _ = next(iter(weights.values())).shape
    limit = _shared_limit(list(weights.values()))
    with drawing(settings, path) as made:
        height = 0.34 + 0.13 * max(nodes, 2)
        figure, grid = plt.subplots(
            layers * len(present) + 1,
            1,
            figsize=(max(5.0, 0.105 * len(words) + 1.4), layers * len(present) * height + 1.5),
            height_ratios=[height] * layers * len(present) + [0.17],
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        made.append(figure)
        for (line, (model, role)), layer in product(enumerate(present), range(layers)):
            axis = grid[line * layers + layer, 0]
            image = axis.imshow(weights[model][layer], aspect="auto", cmap="viridis", vmin=0, vmax=limit)
            axis.set_yticks(range(nodes), entry["nodes"], fontsize=6.5)
            axis.tick_params(length=0, labelbottom=False)
            axis.spines[:].set_visible(False)
            axis.set_ylabel(f"layer {layer + 1}", fontsize=7)
            if layer == 0:
                axis.set_title(role, color=MODELS[model].colour)
        _ruler(grid[-1, 0], parts, maps["labels"])
        grid[-1, 0].set_xticks(range(len(words)), words, rotation=90, fontsize=6.5)
        shown = f" (first {MAX_WORDS} of {len(entry['words'])})" if len(entry["words"]) > MAX_WORDS else ""
        name = f"{entry['formula']} ({entry['material_id']})"
        grid[-1, 0].set_xlabel(f"words of the description of {name}{shown}")
        figure.colorbar(
            image,
            ax=list(grid[:-1, 0]),
            label="attention, mean over heads",
            shrink=0.5,
            pad=0.01,
            extend="max",
        )


def _heads(settings: dict[str, Any], maps: dict[str, Any], path: Path) -> None:
    entry = maps["materials"][0]
    present = [(model, role) for model, role in ROLES if model in maps["models"]]
    weights = {model: entry["maps"][model] for model, _ in present}
    layers, heads, nodes, _ = next(iter(weights.values())).shape
    limit = _shared_limit(list(weights.values()))
    with drawing(settings, path) as made:
        height = 0.16 + 0.07 * max(nodes, 2)
        figure = plt.figure(
            figsize=(max(1.25 * heads, 5) + 1, (layers * height + 0.55) * len(present) + 0.3),
            layout="constrained",
        )
        made.append(figure)
        axes = []
        subfigures = figure.subfigures(len(present), 1, squeeze=False)[:, 0]
        for part, (model, role) in zip(subfigures, present, strict=True):
            part.suptitle(role, color=MODELS[model].colour, size=9.5, weight="bold", ha="left", x=0.02)
            grid = part.subplots(layers, heads, squeeze=False)
            for (layer, head), axis in np.ndenumerate(grid):
                image = axis.imshow(
                    weights[model][layer, head], aspect="auto", cmap="viridis", vmin=0, vmax=limit
                )
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if layer == 0:
                    axis.set_title(f"head {head + 1}", fontsize=7, fontweight="normal", loc="center")
                if head == 0:
                    axis.set_ylabel(f"layer {layer + 1}", fontsize=7)
                    axis.set_yticks(range(nodes), entry["nodes"], fontsize=4.5)
                    axis.tick_params(length=0, pad=1)
                if layer == layers - 1:
                    axis.set_xlabel("words →", fontsize=6, labelpad=1)
            axes.append((part, list(grid.flat)))
        for part, cells in axes:
            part.colorbar(image, ax=cells, shrink=0.8, pad=0.01, extend="max", label="attention")


def _similarity(settings: dict[str, Any], similarity: pd.DataFrame, path: Path) -> None:
    layers = sorted(similarity["layer"].unique())
    heads = {"mean over heads": similarity["head"] < 0, "each head": similarity["head"] >= 0}
    edges = np.linspace(0, 1, 51)
    with drawing(settings, path) as made:
        figure, grid = plt.subplots(
            2,
            len(layers),
            figsize=(2.35 * max(len(layers), 2) + 0.6, 4.2),
            squeeze=False,
            sharex=True,
            sharey="row",
            layout="constrained",
        )
        made.append(figure)
        for (line, name), (column, layer) in product(enumerate(heads), enumerate(layers)):
            axis = grid[line, column]
            chosen = similarity[heads[name] & (similarity["layer"] == layer)]
            for model, role in ROLES:
                part = chosen[chosen["model"] == model]
                if part.empty:
                    continue
                # the middle of a stored bin: its lower end may round into the bin below
                counts, _ = np.histogram(part["low"] + 0.5 / BINS, bins=edges, weights=part["count"])
                share = 100 * counts / counts.sum()
                axis.stairs(share, edges, fill=True, color=MODELS[model].colour, alpha=0.3)
                axis.stairs(share, edges, color=MODELS[model].colour, label=role)
            axis.grid(axis="y")
            axis.set_xlim(max(similarity["low"].min() - 0.02, 0), 1)
            axis.set_title(f"layer {layer}" if line == 0 else "")
            axis.text(0.03, 0.96, _count(chosen), transform=axis.transAxes, va="top", size=6.5, color=MUTED)
            axis.set_xlabel("cosine similarity" if line else "")
            axis.set_ylabel(f"node pairs (%)\n{name}" if column == 0 else "")
        legend_below(figure, *grid[0, 0].get_legend_handles_labels())


def _count(similarity: pd.DataFrame) -> str:
    """How many pairs of nodes a distribution holds, of each model."""
    pairs = similarity.groupby(["model", "seed", "head"])["count"].sum().max()
    shown = [f"n = {pairs:,} pairs"]
    for column in ("head", "seed"):
        times = similarity.groupby("model")[column].nunique().max()
        shown += [f"× {times} {column}s"] if times > 1 else []
    return "\n".join(shown)


def _text(settings: dict[str, Any], text: dict[str, Any], path: Path) -> None:
    weights = np.array(text["weights"])
    chosen = fifth_layers(len(weights))
    count = len(text["words"])
    per_line = min(75, count)
    lines = [(start, min(start + per_line, count)) for start in range(0, count, per_line)]
    heads = weights.shape[1]
    # [CLS] and [SEP] take most of it: the scale is that of the words.
    inner = np.array(text["parts"]) < len(PARTS)
    limit = _shared_limit([weights[chosen][..., inner]])
    with drawing(settings, path) as made:
        figure = plt.figure(
            figsize=(0.125 * per_line + 1.5, len(chosen) * len(lines) * (0.07 * heads + 1.35) + 0.4),
            layout="constrained",
        )
        made.append(figure)
        parts = figure.subfigures(len(chosen), 1, squeeze=False)[:, 0]
        for part, layer in zip(parts, chosen, strict=True):
            part.suptitle(layer_name(layer), size=9.5, weight="bold", ha="left", x=0.02)
            grid = part.subplots(
                3 * len(lines), 1, squeeze=False, height_ratios=[0.07 * heads, 0.12, 0.14] * len(lines)
            )[:, 0]
            cells = []
            for line, (start, stop) in enumerate(lines):
                upper, mean, ruler = grid[3 * line : 3 * line + 3]
                options: Any = {"aspect": "auto", "cmap": "viridis", "norm": PowerNorm(0.5, 0, limit)}
                image = upper.imshow(weights[layer, :, start:stop], **options)
                mean.imshow(weights[layer, :, start:stop].mean(axis=0, keepdims=True), **options)
                upper.set_yticks([0, heads - 1], ["head 1", f"head {heads}"], fontsize=6)
                mean.set_yticks([0], ["mean"], fontsize=6)
                for axis in (upper, mean):
                    axis.set(xlim=(-0.5, per_line - 0.5), xticks=[])
                    axis.tick_params(length=0)
                    axis.spines[:].set_visible(False)
                _ruler(ruler, text["parts"][start:stop], text["labels"])
                ruler.set_xlim(-0.5, per_line - 0.5)
                ruler.set_xticks(range(stop - start), text["words"][start:stop], rotation=90, fontsize=6)
                cells.append(upper)
            part.colorbar(image, ax=cells, label="attention of [CLS]", shrink=0.6, pad=0.01, extend="max")


def layer_name(layer: int) -> str:
    """How a layer (from 0) is called: both ways of counting."""
    return f"layer {layer + 1} (BertViz would call it {layer})"


def counted(name: str, n: float) -> str:
    """A name with its number of crystals, NaN for none; fewer than `FEWEST` have no point beside it."""
    return f"{name} ({n:.0f}{', too few' if n < FEWEST else ''})" if n > 0 else name


def intervals(axis: Axes, rows: pd.DataFrame, places: np.ndarray, **style: Any) -> None:
    """Points with their bootstrap intervals, one a row, at heights `places`."""
    spread = np.abs(rows[["low", "high"]].to_numpy().T - rows["mean"].to_numpy())
    options: dict[str, Any] = {"fmt": "o", "markersize": 4, "elinewidth": 1, **style}
    axis.errorbar(rows["mean"], places, xerr=spread, **options)


def _by_part(settings: dict[str, Any], evidence: pd.DataFrame, models: list[str], path: Path) -> None:
    unit = evidence.loc[evidence["measure"] == "change", "unit"].iloc[0]
    present = [part for part in PARTS if ((evidence["about"] == part) & (evidence["n"] > 0)).any()]
    columns = {
        "attention": ("share of attention (%)", "tokens", 100),
        "attribution": ("share of gradients (%)", "inner tokens", 100),
        "change": (f"change of prediction without it ({unit})", "change by chance", 1),
    }
    with drawing(settings, path) as made:
        figure, grid = plt.subplots(
            len(models),
            3,
            figsize=(9.6, len(models) * (0.55 + 0.17 * len(present)) + 0.6),
            sharey=True,
            sharex="col",
            squeeze=False,
            layout="constrained",
        )
        made.append(figure)
        places = np.arange(len(present))
        for line, model in enumerate(models):
            of_model = evidence[evidence["model"] == model]
            for column, (measure, (label, chance, scale)) in enumerate(columns.items()):
                axis = grid[line, column]
                for name, colour, marker, shift in (
                    (chance, MUTED, "|", 0.2),
                    (measure, MODELS[model].colour, "o", -0.1),
                ):
                    rows = of_model[of_model["measure"] == name].set_index("about").reindex(present)
                    rows[["mean", "low", "high"]] *= scale
                    size = 9 if marker == "|" else 4
                    intervals(axis, rows, places + shift, color=colour, fmt=marker, markersize=size)
                n = of_model[of_model["measure"] == "tokens"].set_index("about").reindex(present)["n"]
                axis.set_yticks(places, [counted(p, n[p]) for p in present], size=7)
                axis.set_ylim(len(present) - 0.5, -0.5)
                axis.tick_params(axis="y", length=0)
                axis.grid(axis="x")
                if line == len(models) - 1:
                    axis.set_xlabel(label, fontsize=7.5)
                    axis.set_xlim(left=0)
            grid[line, 0].set_title(model_label(model), color=MODELS[model].colour, fontsize=8.5)
        handles = [
            plt.Line2D([], [], color=INK, marker="o", linestyle="", markersize=4),
            plt.Line2D([], [], color=MUTED, marker="|", linestyle="", markersize=9),
        ]
        labels = ["measured", "by chance: its share of the tokens, or as many tokens anywhere"]
        legend_below(figure, handles, labels)


def _changes(settings: dict[str, Any], evidence: pd.DataFrame, models: list[str], path: Path) -> None:
    unit = evidence.loc[evidence["measure"] == "change", "unit"].iloc[0]
    measures = {
        "change": f"absolute change of the prediction ({unit})",
        "error change": f"change of the error ({unit})",
    }
    names = {
        "none": "no text",
        "only formula": "formula alone",
        "another crystal's": "another crystal's text",
    }
    with drawing(settings, path) as made:
        figure, axes = panels(2, 2, (4.8, 0.8 + 0.15 * len(CHANGES) * len(models)), sharey=True)
        made.append(figure)
        for axis, (measure, label) in zip(axes, measures.items(), strict=True):
            for place, model in enumerate(models):
                chosen = evidence[(evidence["model"] == model) & (evidence["measure"] == measure)]
                rows = chosen.set_index("about").reindex(list(CHANGES))
                places = np.arange(len(CHANGES)) + (place - (len(models) - 1) / 2) * 0.15
                intervals(axis, rows, places, color=MODELS[model].colour)
            n = evidence[evidence["measure"] == measure].groupby("about")["n"].max()
            shown = [counted(names.get(c, c), n.get(c, 0)) for c in CHANGES]
            axis.set_yticks(range(len(CHANGES)), shown)
            axis.set_ylim(len(CHANGES) - 0.5, -0.5)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x")
            axis.set_xlabel(label)
        axes[0].set_xlim(left=0)
        axes[1].axvline(0, color=MUTED, linewidth=0.8)
        model_legend(figure, models)


def _deletions(settings: dict[str, Any], evidence: pd.DataFrame, models: list[str], path: Path) -> None:
    unit = evidence.loc[evidence["measure"] == "change", "unit"].iloc[0]
    styles: dict[str, Any] = {"attended": "-", "attributed": "--", "random": ":"}
    with drawing(settings, path) as made:
        figure, axes = panels(len(models), 3, (3.2, 2.3), sharey=True, sharex=True)
        made.append(figure)
        highest = evidence.loc[evidence["measure"] == "deletion", "high"].max()
        for axis, model in zip(axes, models, strict=True):
            of_model = evidence[evidence["model"] == model]
            for order in ORDERS:
                rows = of_model[(of_model["measure"] == "deletion") & (of_model["about"] == order)]
                rows = rows.sort_values("share")
                x = 100 * np.array([0, *rows["share"]])
                colour = MUTED if order == "random" else MODELS[model].colour
                axis.plot(x, [0, *rows["mean"]], color=colour, linestyle=styles[order])
                bounds = [0, *rows["low"]], [0, *rows["high"]]
                axis.fill_between(
                    x, *bounds, color=colour, alpha=0.08 if order == "attributed" else 0.15, lw=0
                )
            area = of_model[of_model["about"] == "attended minus random"].iloc[0]
            axis.set_title(model_label(model), color=MODELS[model].colour)
            told = f"{area['mean']:+.3f} ({area['low']:+.3f} to {area['high']:+.3f})\nn = {area['n']:.0f}"
            if area["n"] < FEWEST:
                told = f"n = {area['n']:.0f}, too few"
            axis.text(
                0.03, 0.96, f"area, attended − random\n{told}",
                transform=axis.transAxes, va="top", size=6.5,
            )  # fmt: skip
            axis.grid(visible=True)
            axis.set(xlim=(0, 100), ylim=(0, 1.35 * highest if highest > 0 else 1))  # room for the numbers
            axis.set_xlabel("tokens taken out (%)")
        axes[0].set_ylabel(f"absolute change\nof the prediction ({unit})")
        handles = [
            plt.Line2D([], [], color=MUTED if order == "random" else INK, linestyle=style)
            for order, style in styles.items()
        ]
        legend_below(figure, handles, [ORDER_NAMES[o] for o in styles])


def embed_json(content: Any) -> str:
    """JSON for a script element: compact, and nothing in it ends the element or begins a comment."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return text.replace("<", "\\u003c")
