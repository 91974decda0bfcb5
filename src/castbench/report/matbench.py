"""The report of the study matbench: one HTML file that needs nothing beside it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pandas as pd

from castbench.evaluation.records import read_json
from castbench.labels import MATBENCH, MODELS
from castbench.report import tables
from castbench.report.html import provenance, write_page

log = logging.getLogger(__name__)
TABLES = ("matbench", "matbench_folds")


def render_matbench_report(settings: dict[str, Any], results: Path, output: Path) -> None:
    """Write the report of `results` to `output`; `settings` is the whole configuration, which it shows."""
    write_page(
        "matbench.html",
        {"model_label": tables.model_label, "cell": cell} | context(settings, results),
        output,
    )
    log.info("report of %.1f MB in %s", output.stat().st_size / 1e6, output)


def context(config: dict[str, Any], results: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    settings = {key: config[key] for key in ("dataset", "targets", "models")}
    settings["seeds"] = config["training"]["seeds"]
    files = [results / "tables" / f"{name}.csv" for name in TABLES]
    scores, folds = (tables.records(pd.read_csv(file)) for file in files)
    manifest = read_json(results / "materials" / "manifest.json")
    records = [
        read_json(file) | {"cost": read_json(file.with_name("cost.json"))}
        for file in sorted(results.glob("runs/*.fold_*/*/[0-9]*/metrics.json"))
    ]
    return {
        "settings": settings,
        "kind": kind(manifest),
        "tasks": [MATBENCH[task] for task in settings["targets"]],
        "columns": list({row["model"]: row["label"] for row in scores}.items()),
        "scores": {(row["task"], row["model"]): row for row in scores},
        "best": {task: best([row for row in scores if row["task"] == task]) for task in settings["targets"]},
        "colours": {model: MODELS[model].colour for model in settings["models"]},
        "folds": folds,
        "sizes": {file["task"]: file["n"] for file in manifest["files"]},
        "submissions": [
            f"matbench/{model}/{seed}/results.json.gz"
            for model in settings["models"]
            for seed in settings["seeds"]
        ],
        "seconds": sum(row["seconds"] for row in folds if not math.isnan(row["seconds"])),
        "materials": manifest,
        "graphs": read_json(results / "graphs" / "manifest.json"),
        "training": config["training"] | config["matbench"],
        **provenance(config, "matbench", records, files),
    }


def kind(manifest: dict[str, Any]) -> dict[str, str]:
    """Badge and warning that say what the numbers may be compared with."""
    other = [file["task"] for file in manifest["files"] if not file["published"]]
    if not other:
        return {
            "badge": "Matbench",
            "text": "Matbench's published files and folds: its published scores are compared with ours.",
        }
    return {
        "badge": "own data",
        "text": f"Not as Matbench published them: {', '.join(other)}. Its scores are for reference only.",
    }


def best(rows: list[dict[str, Any]]) -> str | None:
    """The model with the best mean of a task; None where no mean is known."""
    known = [row for row in rows if not math.isnan(row["mean"])]
    if not known:
        return None
    sign = -1 if known[0]["metric"] == "rocauc" else 1
    return min(known, key=lambda row: sign * row["mean"])["model"]


def cell(row: dict[str, Any]) -> str:
    """`0.0689 ± 0.0009`, Matbench's digits; how many runs there are where some are missing."""
    if math.isnan(row["mean"]):
        return f"– [{row['finished']:.0f}/{row['expected']:.0f} runs]"
    decimals = 4 if row["mean"] < 10 else 2
    return f"{row['mean']:.{decimals}f} ± {row['std']:.{decimals}f}"
