"""What attention and the probes say, in numbers, each with its crystals and a bootstrap interval."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from castbench.evaluation.records import write_csv
from castbench.evaluation.statistics import mean_interval
from castbench.labels import TARGETS

log = logging.getLogger(__name__)

COLUMNS = ("model", "measure", "about", "share", "mean", "low", "high", "n", "seeds", "unit")
CHANGES = ("sentences shuffled", "only formula", "another crystal's", "none")
ORDERS = ("attended", "attributed", "random")
# column of by_material.parquet: measure
ATTENTION = {
    "similarity": "similarity",
    "similarity_heads": "similarity within heads",
    "effective_tokens": "effective tokens",
    "effective_tokens_heads": "effective tokens within heads",
}


def tabulate_evidence(settings: dict[str, Any], attention: Path, output: Path) -> None:
    """Write evidence.csv, one row a number.

    A row is the mean over n test crystals and its 95 % bootstrap interval over them; of fewer than five, n
    alone. What the `seeds` runs of a model say, and draws of anything random, is averaged for each crystal
    first. Measures, each of `about`:
        similarity, effective tokens (each also "within heads"): of a layer; see `BY_MATERIAL`.
        the same with ", with minus without pretraining": the paired difference, of the seeds of both.
        tokens, attention, attribution: share of a part of the description among the tokens, of the attention
            to tokens, of the absolute integrated gradients; of the crystals that have the part. [CLS] and
            [SEP] have no gradients: "inner tokens" is the share among the others.
        change: absolute change of the prediction (in `unit`) without a part, or with the text of `CHANGES`.
        change by chance: the same without as many tokens anywhere; and change minus chance.
        error change: change of the absolute error; negative where the changed text is better.
        deletion: absolute change without the `share` of tokens that come first in an order of `ORDERS`.
        area: that under the deletion curve, the mean change over all shares; "attended minus random" is
            the paired difference.
        rank correlation: of attention with absolute gradients over the tokens of a crystal (Spearman).
        accuracy: share of a crystal's hidden nodes that pretraining names right, with a text of `CHANGES`,
            the own one, or without a part.

    Args:
        settings: {target, probed, compared}: the target whose models were probed, these models, and whether
            CAST's attention with and without pretraining is compared.
        attention: folder with probes/{model}.parquet of them, and by_material.parquet.
        output: evidence.csv.
    """
    unit = TARGETS[settings["target"]].unit
    rows = []
    if settings["compared"]:
        rows += list(attention_rows(pd.read_parquet(attention / "by_material.parquet")))
    for model in sorted(settings["probed"]):
        frame = pd.read_parquet(attention / "probes" / f"{model}.parquet")
        if frame.empty:
            continue
        found = accuracy_rows(frame) if model == "masked_node" else probe_rows(frame, unit)
        rows += [{"model": model, "seeds": frame["seed"].nunique(), **row} for row in found]
    write_csv(output, pd.DataFrame(rows, columns=list(COLUMNS)))
    log.info("%d numbers", len(rows))


def number(measure: str, about: object, values: pd.Series, unit: str = "", share: float | None = None) -> Any:
    """A row without its model: mean and interval of `values`, one a crystal, NaN left out."""
    kept = values.dropna().to_numpy(float)
    mean, low, high = mean_interval(kept)
    row = {"measure": measure, "about": about, "share": share, "mean": mean, "low": low, "high": high}
    return row | {"n": len(kept), "unit": unit}


def attention_rows(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Similarity and effective tokens of each model and layer, and what pretraining changes."""
    seeds = {str(name): set(part["seed"]) for name, part in frame.groupby("model")}
    common = set.intersection(*(seeds.get(name, set()) for name in ("cast", "cast_scratch")))
    for layer, group in frame.groupby("layer"):
        by_model = dict(list(group.groupby("model")))
        for column, measure in ATTENTION.items():
            unit = "tokens" if "tokens" in measure else ""
            for name, part in by_model.items():
                values = per_crystal(part, column)
                yield {"model": name, "seeds": len(seeds[str(name)]), **number(measure, layer, values, unit)}
            if common:
                both = group[group["seed"].isin(common)]
                first, second = (
                    per_crystal(both[both["model"] == name], column) for name in ("cast", "cast_scratch")
                )
                what = f"{measure}, with minus without pretraining"
                yield {"model": "cast", "seeds": len(common), **number(what, layer, first - second, unit)}


def per_crystal(frame: pd.DataFrame, column: str = "value") -> pd.Series:
    """Mean over the seeds and draws of each crystal, by material_id."""
    return frame.groupby("material_id")[column].mean()


def probe_rows(frame: pd.DataFrame, unit: str) -> Iterator[dict[str, Any]]:
    """Rows of a model that predicts a target."""
    own = frame[frame["condition"] == "own"].set_index(["seed", "material_id"])["value"]
    before = own.loc[pd.MultiIndex.from_frame(frame[["seed", "material_id"]])].to_numpy()
    frame = frame.assign(
        change=(frame["value"] - before).abs(),
        error=(frame["value"] - frame["truth"]).abs() - (before - frame["truth"]).abs(),
    )
    conditions = dict(list(frame.groupby("condition")))
    for condition in CHANGES:
        if condition in conditions:
            yield number("change", condition, per_crystal(conditions[condition], "change"), unit)
            yield number("error change", condition, per_crystal(conditions[condition], "error"), unit)
    without, chance = conditions["without"], conditions["random"]
    shares = {name: conditions[name] for name in ("attention", "attribution")}
    for part, group in without.groupby("part", sort=False):
        one, other = per_crystal(group, "change"), per_crystal(chance[chance["part"] == part], "change")
        yield number("change", part, one, unit)
        yield number("change by chance", part, other, unit)
        yield number("change minus chance", part, one - other, unit)
        yield number("error change", part, per_crystal(group, "error"), unit)
        for name, every in shares.items():
            mass = every[(every["part"] == part) & every["material_id"].isin(one.index)]
            yield number(name, part, per_crystal(mass))
            yield number(
                "tokens" if name == "attention" else "inner tokens", part, per_crystal(mass, "share")
            )
    special = shares["attention"].query("part == '[CLS], [SEP]'")
    yield number("attention", "[CLS], [SEP]", per_crystal(special))
    yield number("tokens", "[CLS], [SEP]", per_crystal(special, "share"))
    areas = {}
    for order in ORDERS:
        curve = conditions[f"delete {order}"].pivot_table("change", "material_id", "share")
        for share in curve.columns.to_numpy(float):
            yield number("deletion", order, curve[share], unit, float(share))
        shares_of_curve = np.array([0, *curve.columns], float)
        values = np.concatenate([np.zeros((len(curve), 1)), curve.to_numpy()], axis=1)
        areas[order] = pd.Series(np.trapezoid(values, shares_of_curve, axis=1), index=curve.index)
        yield number("area", order, areas[order], unit)
    for order in ORDERS[:2]:
        yield number("area", f"{order} minus random", areas[order] - areas["random"], unit)
    yield number("rank correlation", "attention and gradients", per_crystal(conditions["rank correlation"]))


def accuracy_rows(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of masked node pretraining."""
    frame = frame.assign(accuracy=frame["value"] / frame["truth"])
    for condition in ("own", *CHANGES):
        chosen = frame[frame["condition"] == condition]
        if len(chosen):
            yield number("accuracy", condition, per_crystal(chosen, "accuracy"))
    for part, group in frame[frame["condition"] == "without"].groupby("part", sort=False):
        yield number("accuracy", part, per_crystal(group, "accuracy"))
        chance = frame[(frame["condition"] == "random") & (frame["part"] == part)]
        yield number("accuracy by chance", part, per_crystal(chance, "accuracy"))
