"""The report of the composition study: one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from castbench.config import composition_summary
from castbench.evaluation.records import read_json
from castbench.labels import CLASS_TARGETS, COMPOSITION_MODELS, TARGETS
from castbench.report import tables
from castbench.report.composition_figures import POOLS, label, stability_rule
from castbench.report.html import embed, kind_of_run, provenance, write_page

log = logging.getLogger(__name__)
PLOTTED = 20_000  # candidates of the interactive plot, the first by rank
POINTS = {
    "formula": "formula", "band_gap_mean": "gap", "band_gap_std": "gapStd", "stability_mean": "p",
    "stability_std": "pStd", "goldschmidt": "t", "bartel": "tau", "known": "known", "known_stable": "stable",
}  # fmt: skip


def render_composition_report(settings: dict[str, Any], results: Path, output: Path) -> None:
    """Write the report of `results` to `output`; `settings` is the whole configuration, which it shows."""
    functions = {
        "figure": lambda name: embed(results / "figures" / name),
        "label": label,
        "mean_std": mean_std,
    }
    write_page("compositions.html", functions | context(settings, results), output)
    log.info("report of %.1f MB in %s", output.stat().st_size / 1e6, output)


def mean_std(row: dict[str, Any], name: str) -> str:
    """`0.426 (0.011)`; without brackets where one run, or a paper, has no standard deviation."""
    mean, std = row.get(f"{name}_mean"), row.get(f"{name}_std")
    if mean is None or pd.isna(mean):
        return "–"
    return f"{mean:.3f}" if std is None or pd.isna(std) else tables.mean_std(mean, std)


def context(config: dict[str, Any], results: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    settings = composition_summary(config)
    folder = results / "tables"
    frames = {file.stem: pd.read_csv(file) for file in folder.glob("*.csv")}
    runs = frames["composition_runs"]
    records = [
        read_json(file) | {"cost": read_json(file.with_name("cost.json"))}
        for model in settings["models"]
        for seed in settings["seeds"]
        if (file := results / "composition_runs" / model / str(seed) / "metrics.json").exists()
    ]
    ranked = results / "screening" / "ranked.csv"
    return {
        "settings": settings,
        "kind": kind_of_run(settings | {"text_encoder": ""}),
        "file": Path(config["materials"]["path"]).name,
        "rule": stability_rule(settings),
        "numbers": [TARGETS[target] for target in settings["regression"]],
        "classes": [CLASS_TARGETS[target] for target in settings["classification"]],
        "colours": {name: model.colour for name, model in COMPOSITION_MODELS.items()},
        "inputs_of": {name: model.inputs for name, model in COMPOSITION_MODELS.items()},
        "gap": tables.records(frames["composition_gap"]),
        "stability": tables.records(frames["composition_stability"]),
        "enrichment": tables.records(frames["enrichment"]),
        "pools": POOLS,
        "runs": tables.records(runs),
        "seconds": runs["seconds"].sum(),
        "manifest": read_json(results / "compositions" / "manifest.json"),
        "split": read_json(results / "splits" / "compositions.json"),
        "screening": read_json(results / "screening" / "summary.json"),
        "validation": read_json(results / "screening" / "validation.json"),
        "attention": {
            k: v["formula"] for k, v in read_json(results / "attention" / "compositions.json").items()
        },
        "ranked": tables.records(pd.read_csv(ranked).head(50)),
        "points": plot_points(results / "screening" / "candidates.parquet"),
        "plotted": PLOTTED,
        "architecture": {name: config["compositions"][name] for name in ("edm_transformer", "training")},
        **provenance(config, "compositions", records, [*sorted(folder.glob("*.csv")), ranked]),
    }


def plot_points(candidates: Path) -> str:
    """JSON of the first candidates inside the windows, column by column, for the interactive plot."""
    table = pq.read_table(candidates, columns=[*POINTS, "rank", "in_window"])
    table = table.filter(pc.and_(table["in_window"], pc.less_equal(table["rank"], PLOTTED))).sort_by("rank")
    columns = {}
    for name, short in POINTS.items():
        values = table[name].to_pylist()
        columns[short] = [
            round(v, 4) if isinstance(v, float) else v for v in (None if v != v else v for v in values)
        ]
    # "<" would end the script that it stands in.
    return json.dumps(columns, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
