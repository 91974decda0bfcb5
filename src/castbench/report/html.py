"""The report: one HTML file that needs nothing beside it, made from tables, figures and records."""

import base64
import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pandas as pd
import yaml

from castbench import config as meaning
from castbench.deviations import deviations
from castbench.evaluation.aggregate import is_paper_setting, table1_cells
from castbench.evaluation.records import RESOURCES, ordered_models, ordered_targets, read_json
from castbench.labels import MODELS, TARGETS
from castbench.provenance import atomic_path
from castbench.report import tables
from castbench.report.attention import browser_maps, browser_text, embed_json, read_evidence, read_maps
from castbench.report.figures import INK, MUTED, RULE
from castbench.text.parts import PARTS

log = logging.getLogger(__name__)

CAPTIONS = RESOURCES.parent / "report"
DARK = {INK: "#e6edf3", MUTED: "#9aa4ae", RULE: "#30363d"}
MAX_SVG = 1_000_000  # bytes; a larger figure is embedded as PNG
DOWNLOADS = {
    ".csv": "text/csv",
    ".md": "text/markdown",
    ".tex": "application/x-tex",
    ".jsonl": "application/jsonl",
}
PRETRAINING = {
    "objective": "Objective",
    "seed": "Seed",
    "status": "Status",
    "reason": "Reason",
    "n_train": "Training crystals",
    "n_validation": "Validation crystals",
    "epochs": "Epochs",
    "validation_loss": "Loss",
    "validation_accuracy": "Accuracy",
    "validation_accuracy_shuffled_text": "Accuracy, text shuffled",
    "validation_accuracy_without_text": "Accuracy, no text",
    "parameters_trainable": "Trainable parameters",
    "seconds": "Time (s)",
    "peak_memory_mb": "Peak memory (MB)",
}
OBJECTIVES = {"masked_node": "Masked node prediction (CAST)", "contrastive": "Contrastive (MultiMat)"}


def render_report(settings: dict[str, Any], results: Path, output: Path) -> None:
    """Write the report of `results` (tables, figures, attention, records) to `output`.

    `settings` is the whole configuration, which the report shows.
    """
    functions = {"figure": lambda name: embed(results / "figures" / name), "model_label": tables.model_label}
    write_page("report.html", functions | context(settings, results), output)
    log.info("report of %.1f MB in %s", output.stat().st_size / 1e6, output)


def write_page(template: str, content: dict[str, Any], output: Path) -> None:
    """Render a template of this package with `content`, values and functions, and write the page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("castbench.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "significant": significant, "fixed": fixed, "code": code}
    environment.filters |= {"json": json_element, "interval": interval}
    environment.globals["caption"] = caption
    page = environment.get_template(template).render(content)
    with atomic_path(output) as partial:
        partial.write_text(page, encoding="utf-8")


def number(value: Any) -> str:
    """A count with thousands separators; a dash for none."""
    return "–" if value is None or pd.isna(value) else f"{value:,.0f}"


def significant(value: Any, digits: int = 3) -> str:
    """A value to some significant digits, a whole number as it is, without exponent; a dash for none."""
    if value is None or pd.isna(value):
        return "–"
    if float(value).is_integer():
        return number(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def fixed(value: Any, decimals: int) -> str:
    """A value with a fixed number of decimals; a dash for none."""
    return "–" if value is None or pd.isna(value) else f"{value:,.{decimals}f}"


def code(text: str) -> markupsafe.Markup:
    """Text in which `backticks` mark code."""
    parts = text.split("`")
    return markupsafe.Markup("").join(
        markupsafe.Markup("<code>{}</code>").format(part) if place % 2 else part
        for place, part in enumerate(parts)
    )


def caption(name: str) -> str:
    """The caption that Snakemake's report shows for the same item."""
    return " ".join((CAPTIONS / f"{name}.rst").read_text(encoding="utf-8").split())


def embed(path: Path) -> str:
    """Data URI of `path`.svg, made to follow light or dark mode; of the PNG where the SVG is large."""
    svg = path.with_suffix(".svg")
    if svg.stat().st_size > MAX_SVG:
        return data_uri(path.with_suffix(".png").read_bytes(), "image/png")
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    head, tag, rest = svg.read_text(encoding="utf-8").partition("<defs>")
    return data_uri(f"{head}{style}{tag}{rest}".encode(), "image/svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    """`content` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def context(config: dict[str, Any], results: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    settings = meaning.table_settings(config)
    folder = results / "tables"
    runs = pd.read_csv(folder / "runs.csv")
    records = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    finished = [record for record in records if record["status"] == "finished"]
    cells = table1_cells(runs, settings, results)
    targets = ordered_targets(settings)
    funnel = read_json(results / "funnel.json")
    materials = read_json(results / "materials" / "manifest.json")
    return {
        "settings": settings,
        "kind": kind_of_run(settings),
        "paper_compared": is_paper_setting(settings),
        "file": ", ".join(Path(file["path"]).name for file in materials["files"]),
        "targets": [TARGETS[target] for target in targets],
        "structure_encoder": MODELS["structure_only"].label,
        "models": [MODELS[model] for model in ordered_models(settings)],
        "headers": [tables.header(cells, target) for target in targets],
        "table1": table1_rows(cells),
        "table1_note": tables.note(cells),
        "comparisons": comparison_rows(folder / "comparisons.csv", targets, len(settings["seeds"])),
        "text_gain": gain_rows(folder / "text_gain.csv", targets, len(settings["seeds"])),
        "table2": tables.records(pd.read_csv(folder / "table2.csv")),
        "collected": funnel["n_collected"],
        "rejected": sorted(funnel["rejected_by_reason"].items()),
        "materials": materials,
        "graphs": read_json(results / "graphs" / "manifest.json"),
        "tokens": read_json(results / "tokens" / "manifest.json"),
        "descriptions": read_json(results / "descriptions.json"),
        "runs": tables.records(runs),
        "statuses": sorted(Counter(runs["status"]).items()),
        "seconds": runs["seconds"].sum(),
        "pretraining": pretraining_rows(folder / "pretraining.csv"),
        "attention": attention_summary(results, settings["models"], len(settings["seeds"])),
        "inputs": distinct(finished, "inputs"),
        **provenance(
            config, "cast", finished, [file for file in sorted(folder.iterdir()) if file.suffix in DOWNLOADS]
        ),
    }


def provenance(
    config: dict[str, Any], study: str, records: list[dict[str, Any]], files: list[Path]
) -> dict[str, Any]:
    """What every report says of its runs: where they depart, how they were made; and `files` to download.

    Args:
        config: the whole configuration.
        study: of `deviations`.
        records: of the runs, with `cost`.
        files: of kinds in `DOWNLOADS`.
    """
    return {
        "deviations": deviations(study),
        "versions": distinct(records, "versions"),
        "hardware": distinct([record["cost"] for record in records], "hardware"),
        "commits": sorted({str(record.get("commit")) for record in records}),
        "configuration": yaml.safe_dump(config, sort_keys=False),
        "downloads": [
            (file.name, data_uri(file.read_bytes(), DOWNLOADS[file.suffix]), file.stat().st_size)
            for file in files
        ],
    }


def kind_of_run(settings: dict[str, Any]) -> dict[str, str]:
    """Badge and warning that say what the numbers may be compared with."""
    if settings["source"] == "demo":
        return {
            "badge": "demo",
            "text": "A demo run on the small prototype crystals that come with the project, labelled by its "
            "own density-functional theory. It shows that the pipeline works; its numbers are neither "
            "the paper's nor evidence for or against a model. Energies above hull come from a hull "
            "that knows only the phases in this set.",
        }
    if is_paper_setting(settings):
        return {
            "badge": "paper",
            "text": "The paper's data and encoders: its values are compared with ours.",
        }
    return {
        "badge": "own data",
        "text": "Data or encoders are not the paper's, whose values are shown for reference only.",
    }


def table1_rows(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of Table 1: label, colour, inputs and cells with text, rank, paper's text, and `near`.

    `near` is whether a comparable value lies within two combined standard deviations of the paper's; None
    where a run is missing, or there is one seed alone.
    """
    rows = []
    for model, group in tables.rows(cells):
        shown = []
        for cell in group:
            near = None
            complete = cell["finished"] == cell["expected"] and not math.isnan(cell["std"])
            if cell["comparable"] is True and complete:
                near = abs(cell["difference"]) <= 2 * math.hypot(cell["std"], cell["paper_std"])
            paper = "" if math.isnan(cell["paper_mean"]) else tables.paper_text(cell)
            text = tables.cell_text(cell)
            shown.append(
                {"text": text, "mean": cell["mean"], "rank": cell["rank"], "paper": paper, "near": near}
            )
        known = MODELS.get(model)
        rows.append(
            {
                "label": tables.model_label(model),
                "colour": known.colour if known else None,
                "inputs": known.inputs if known else "",
                "cells": shown,
            }
        )
    return rows


def comparison_rows(
    file: Path, targets: list[str], seeds: int
) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """(models compared, a cell or None for each target) of comparisons.csv; see `judged`."""
    return [
        (f"{tables.model_label(model)} − {tables.model_label(other)}", cells)
        for model, other, cells in by_target(file, "model", "minus", targets, seeds)
    ]


def by_target(
    file: Path, first: str, second: str, targets: list[str], seeds: int
) -> list[tuple[str, str, list[dict[str, Any] | None]]]:
    """(two columns, a cell or None for each target) of a table of differences of errors; see `judged`."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in tables.records(pd.read_csv(file)):
        found.setdefault((row[first], row[second]), {})[row["target"]] = judged(row, seeds)
    return [(*pair, [cells.get(target) for target in targets]) for pair, cells in found.items()]


def judged(row: dict[str, Any], seeds: int) -> dict[str, Any]:
    """A difference of errors with `verdict`, "near" (better) or "far" if its interval excludes zero.

    Where not all `seeds` finished it has none, and `short` says how many did.
    """
    if row["seeds"] < seeds:
        return row | {"verdict": "", "short": f"{row['seeds']} of {seeds} seeds"}
    return row | {"verdict": "near" if row["high"] < 0 else "far" if row["low"] > 0 else "", "short": ""}


def gain_rows(
    file: Path, targets: list[str], seeds: int
) -> list[tuple[str, str, list[dict[str, Any] | None]]]:
    """(what groups, group, a cell or None for each target) of text_gain.csv; see `judged`."""
    order = ("all", "crystal system", "sites", "text")
    return sorted(by_target(file, "by", "group", targets, seeds), key=lambda row: order.index(row[0]))


def pretraining_rows(file: Path) -> tuple[list[str], list[list[Any]]]:
    """Headers of the columns of `PRETRAINING` that hold anything, and the rows below them."""
    frame = pd.read_csv(file)
    if frame.empty:
        return [], []
    frame = frame.dropna(axis="columns", how="all")
    frame["objective"] = frame["objective"].map(OBJECTIVES).fillna(frame["objective"])
    columns = [name for name in PRETRAINING if name in frame.columns]
    return [PRETRAINING[name] for name in columns], frame[columns].astype(object).to_numpy().tolist()


def json_element(content: Any) -> markupsafe.Markup:
    """JSON that may stand in a script element."""
    return markupsafe.Markup(embed_json(content))


def interval(
    row: dict[str, Any] | None, scale: float = 1, decimals: int = 3, sign: bool = False
) -> markupsafe.Markup:
    """A mean and below it its 95 % interval; a dash for none, with the reason where crystals are too few."""
    if row is None or not row["n"]:
        return markupsafe.Markup("–")
    if math.isnan(row["mean"]):
        return markupsafe.Markup(f"–<small>n = {row['n']:.0f}, too few</small>")
    form = f"{'+' if sign else ''}.{decimals}f"
    low, mean, high = (format(scale * row[key], form) for key in ("low", "mean", "high"))
    return markupsafe.Markup(f"{mean}<small>{low} to {high}</small>")


def attention_summary(results: Path, models: list[str], seeds: int) -> dict[str, Any]:
    """What the report says of attention: the interactive views' data, and evidence.csv as tables.

    Of the configured `models` alone, whatever else earlier configurations have left.

    Keys: maps, text (data of the views, or None); notes (what could not be shown); target; shown (the seeds
    of the maps); seeds (of the numbers); layers (rows of Figure 3's numbers); similarity (pairs, crystals,
    one_node, seeds by model); verdict; rows (evidence by model, measure and about).
    """
    reading = [model for model in models if meaning.MODELS[model][0] != "none"]
    maps = read_maps(results) if {"cast", "cast_scratch"} <= set(models) else {}
    text = read_json(results / "attention" / "text.json") if reading else {}
    summary: dict[str, Any] = {
        "maps": browser_maps(maps) if maps.get("models") else None,
        "text": browser_text(text) if "weights" in text else None,
        "notes": [found["note"] for found in (maps, text) if found.get("note")],
        "encoder": text.get("encoder"),
        "target": maps.get("target"),
        "shown": sorted(set(maps.get("seeds", {}).values())),
        "seeds": [],
        "verdict": "",
        "similarity": {},
        "layers": [],
        "rows": {},
        "parts": PARTS,
    }
    if not reading or not (results / "tables" / "evidence.csv").exists():
        return summary
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    evidence = read_evidence(results)
    summary["seeds"] = sorted(evidence["seeds"].unique().tolist())
    for row in tables.records(evidence):
        if row["measure"] != "deletion":
            rows.setdefault(row["model"], {}).setdefault(row["measure"], {})[row["about"]] = row
    summary["unit"] = next((r["unit"] for m in rows.values() for r in m.get("change", {}).values()), "")
    summary["rows"] = {model: rows[model] for model in (*MODELS, "masked_node") if model in rows}
    if summary["maps"]:
        by_material = pd.read_parquet(results / "attention" / "by_material.parquet")
        counts = pd.read_parquet(results / "attention" / "similarity.parquet")
        first = by_material[by_material["layer"] == 1]
        pairs = counts[(counts["layer"] == 1) & (counts["head"] < 0)].groupby("model")["count"].sum()
        for model, group in first.groupby("model"):
            runs = group["seed"].nunique()
            crystals, alone = group["material_id"].nunique(), int((group["n_nodes"] < 2).sum()) // runs
            summary["similarity"][model] = {
                "pairs": int(pairs.get(model, 0)) // runs, "crystals": crystals - alone, "one_node": alone,
                "seeds": runs,
            }  # fmt: skip
        summary["layers"] = sorted(by_material["layer"].unique().tolist())
        summary["verdict"] = verdict(rows.get("cast", {}), summary["layers"], seeds)
    return summary


def verdict(rows: dict[str, dict[str, Any]], layers: list[int], seeds: int) -> str:
    """Whether the paper's effect of pretraining on the similarity of attention is seen, in a sentence.

    None where an interval or one of the `seeds` is missing.
    """
    found = rows.get("similarity, with minus without pretraining", {})
    changes = [found[str(layer)] for layer in layers if str(layer) in found]
    if not changes or any(math.isnan(row["low"]) or row["seeds"] < seeds for row in changes):
        return ""
    lower, higher = sum(row["high"] < 0 for row in changes), sum(row["low"] > 0 for row in changes)
    seen = "seen" if lower == len(changes) else "seen in part" if lower else "not seen"
    return (
        f"The paper reports that with pretraining the nodes of a crystal read more varied words. Here their "
        f"attention is less alike with pretraining in {lower} of {len(changes)} layers and more alike in "
        f"{higher} (the interval excludes zero): the effect is {seen}."
    )


def distinct(records: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The different values of a key, in order of appearance."""
    values = {json.dumps(record[key], sort_keys=True): record[key] for record in records if record.get(key)}
    return list(values.values())
