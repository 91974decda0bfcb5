"""Run records to tables. A missing, failed or skipped run is a gap: it is counted and enters no mean."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from castbench.config import objective, table_settings
from castbench.evaluation.records import (
    RESOURCES,
    WORKFLOW,
    ordered_models,
    ordered_targets,
    read_errors,
    read_json,
    read_run,
    write_csv,
    write_text,
)
from castbench.evaluation.statistics import (
    CRYSTAL_SYSTEMS,
    dataset_statistics,
    mean_baseline,
    mean_interval,
    read_crystals,
    site_groups,
    site_labels,
)
from castbench.labels import TARGETS
from castbench.report import tables

log = logging.getLogger(__name__)

# What the paper argues from: (this, minus that); for CAST the CrysMMNet that treats its text alike.
COMPARISONS = (
    ("cast", "cast_scratch"),
    ("cast", "crysmmnet_frozen"),
    ("cast", "crysmmnet_lora"),
    ("cast", "multimat"),
    ("cast_scratch", "crysmmnet_frozen"),
    ("cast_scratch", "crysmmnet_lora"),
    ("crysmmnet_lora", "crysmmnet_frozen"),
    ("crysmmnet_frozen", "structure_only"),
    ("multimat", "structure_only"),
)
PAPER = {"text_only", *itertools.chain(*COMPARISONS)}  # its models


def aggregate_runs(settings: dict[str, Any], results: Path, output: Path) -> None:
    """Write Table 1, Table 2, runs, pretraining, comparisons and the text's gain into `output`.

    `settings` are those of `config.table_settings`: they name the runs to expect.
    """
    records = read_records(results, settings)
    runs = pd.DataFrame([run_row(record) for record in records])
    gaps = runs[runs["status"] != "finished"]
    for row in gaps.itertuples():
        log.warning("run %s/%s/%s: %s, %s; it is a gap in the tables", row.target, row.model, row.seed,
                    row.status, row.reason or "no reason recorded")  # fmt: skip
    cells = table1_cells(runs, settings, results)
    statistics = with_paper_statistics(dataset_statistics(results, ordered_targets(settings)))

    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "runs.csv", runs)
    write_csv(output / "table1.csv", tables.table1_wide(cells))
    write_csv(output / "table2.csv", statistics)
    write_csv(output / "pretraining.csv", read_pretraining(results, settings))
    write_csv(output / "comparisons.csv", comparisons(results, settings, runs))
    write_csv(output / "text_gain.csv", text_gain(results, settings, runs))
    write_text(output / "table1.md", tables.table1_markdown(cells, settings))
    write_text(output / "table1.tex", tables.table1_latex(cells, settings))
    write_text(output / "runs.jsonl", "".join(json.dumps(r, sort_keys=True) + "\n" for r in records))
    log.info("%d runs finished, %d gaps", len(runs) - len(gaps), len(gaps))


def read_records(results: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Record, with `cost`, of every configured run by target, model, seed; "missing" where there is none."""
    records = []
    for target in ordered_targets(settings):
        for model in ordered_models(settings):
            for seed in settings["seeds"]:
                folder = results / "runs" / target / model / str(seed)
                record = read_run(folder) | {"target": target, "model": model, "seed": seed}
                record |= {"unit": TARGETS[target].unit, "cost": read_json(folder / "cost.json")}
                records.append(record)
    return records


def run_row(record: dict[str, Any]) -> dict[str, Any]:
    """The flat row of `runs.csv` of a record; scores and costs that it lacks are None."""

    def part(name: str) -> dict[str, Any]:
        return record.get(name) or {}

    finished = record["status"] == "finished"
    row = {key: record.get(key) for key in ("target", "model", "seed", "status", "reason", "unit")}
    row |= {f"n_{split}": part("n").get(split) for split in ("train", "validation", "test")}
    row |= {score: part("test").get(score) if finished else None for score in ("mae", "rmse", "r2")}
    row["validation_mae"] = part("validation").get("mae") if finished else None
    row |= {key: record.get(key) for key in ("best_epoch", "epochs", "steps", "text")}
    row |= {f"parameters_{kind}": part("parameters").get(kind) for kind in ("total", "trainable")}
    row |= {key: part("cost").get(key) for key in ("seconds", "samples_per_second", "peak_memory_mb")}
    row["pretrained"] = (
        "{objective}/{seed}".format(**record["pretrained"]) if record.get("pretrained") else None
    )
    return row | {"commit": record.get("commit")}


def is_paper_setting(settings: dict[str, Any]) -> bool:
    """Whether data and encoders are those of the preset paper.yaml, so that the paper's numbers compare.

    The seed of the split does not matter, nor how strictly moduli are ordered (deviation moduli_order).
    """

    def compared(found: dict[str, Any]) -> list[Any]:
        ordered = bool(found["filters"]["ordered_moduli"])
        kept = [found[key] for key in ("source", "sample", "structure_encoder", "max_tokens")]
        shares = [found["split"][key] for key in ("fractions", "group_by")]
        return [*kept, *shares, found["filters"] | {"ordered_moduli": ordered}]

    if "matscibert" not in settings["text_encoder"].lower():
        return False
    paper = yaml.safe_load((WORKFLOW / "presets" / "paper.yaml").read_text(encoding="utf-8"))
    return compared(settings) == compared(table_settings(paper))


def table1_cells(runs: pd.DataFrame, settings: dict[str, Any], results: Path) -> pd.DataFrame:
    """Table 1, one row a (model, target), last the baseline "training_mean".

    Columns: mean, std (sample, ddof = 1) over the finished seeds, in `unit`; finished, expected (numbers of
    runs); rank (1 = lowest mean, among cells with every seed finished); n_train, n_validation, n_test;
    paper_mean, paper_std; comparable; difference = mean - paper_mean, only where comparable.
    """
    paper = pd.read_csv(RESOURCES / "paper" / "table1.csv")
    known = {(row["model"], row["target"]): row for row in tables.records(paper)}
    if settings["structure_encoder"] != "cogn":  # the paper's row is coGN
        known = {key: row for key, row in known.items() if key[0] != "structure_only"}
    rows = []
    for target in ordered_targets(settings):
        for model in ordered_models(settings):
            group = runs[(runs["model"] == model) & (runs["target"] == target)]
            done = group.loc[group["status"] == "finished", "mae"]
            published = known.get((model, target), {"mae_mean": np.nan, "mae_std": np.nan})
            rows.append(
                {
                    "model": model,
                    "target": target,
                    "unit": TARGETS[target].unit,
                    "mean": done.mean(),
                    "std": done.std(ddof=1),
                    "finished": len(done),
                    "expected": len(group),
                    **group[["n_train", "n_validation", "n_test"]].max(),
                    "paper_mean": published["mae_mean"],
                    "paper_std": published["mae_std"],
                }
            )
    cells = pd.DataFrame(rows)
    complete = cells["finished"] == cells["expected"]
    cells["rank"] = cells["mean"].where(complete).groupby(cells["target"]).rank(method="min")
    cells["comparable"] = is_paper_setting(settings) & cells["paper_mean"].notna()
    cells["difference"] = (cells["mean"] - cells["paper_mean"]).where(cells["comparable"])
    baseline = [
        {"model": tables.BASELINE, "target": t, "unit": TARGETS[t].unit, "mean": mean_baseline(results, t)}
        for t in ordered_targets(settings)
    ]
    return pd.concat([cells, pd.DataFrame(baseline)], ignore_index=True)


def with_paper_statistics(statistics: pd.DataFrame) -> pd.DataFrame:
    """Our Table 2 and the paper's columns, for train, val/test and, counts alone, all."""
    paper = pd.read_csv(RESOURCES / "paper" / "table2.csv").drop(columns="source")
    total = paper.groupby("target", as_index=False)[["n", "text_count"]].sum()
    total = total.assign(split="all", text_percent=100 * total["text_count"] / total["n"])
    paper = pd.concat([paper, total])
    paper = paper.rename(columns={c: f"paper_{c}" for c in paper.columns if c not in ("target", "split")})
    return statistics.merge(paper, how="left", on=["target", "split"])


def read_pretraining(results: Path, settings: dict[str, Any]) -> pd.DataFrame:
    """One row a pretraining run: objective, seed, status, sizes, validation scores, parameters, cost."""
    rows = []
    wanted = {found for model in settings["models"] if (found := objective(model))}
    for name, seed in itertools.product(sorted(wanted), sorted(settings["seeds"])):
        file = results / "pretrain" / name / str(seed) / "metrics.json"
        record = read_run(file.parent)
        row: dict[str, Any] = {"objective": name, "seed": seed}
        row |= {key: record.get(key) for key in ("status", "reason", "best_epoch", "epochs", "steps")}
        for key in ("n", "validation", "parameters"):
            row |= {f"{key}_{name}": value for name, value in (record.get(key) or {}).items()}
        cost = read_json(file.with_name("cost.json"))
        rows.append(row | {key: cost.get(key) for key in ("seconds", "samples_per_second", "peak_memory_mb")})
    return pd.DataFrame(rows, columns=None if rows else ["objective", "seed", "status"])


def paired_errors(
    results: Path, runs: pd.DataFrame, target: str, model: str, other: str
) -> tuple[pd.Series, int]:
    """Absolute test error of `model` minus that of `other`, by id, mean over the seeds that both finished.

    Also the number of these seeds; without one the series is empty.
    """
    finished = runs[(runs["target"] == target) & (runs["status"] == "finished")]
    seeds = [set(finished.loc[finished["model"] == name, "seed"]) for name in (model, other)]
    common = sorted(set.intersection(*seeds))
    first, second = (read_errors(results, target, name, common) for name in (model, other))
    return first - second.reindex(first.index), len(common)


def compared_pairs(models: list[str]) -> list[tuple[str, str]]:
    """The paper's, and each model that it has not, minus the structure encoder alone and minus CAST."""
    new = [model for model in models if model not in PAPER]
    return [*COMPARISONS, *itertools.product(new, ("structure_only", "cast"))]


def comparisons(results: Path, settings: dict[str, Any], runs: pd.DataFrame) -> pd.DataFrame:
    """Paired differences of test error, see `compared_pairs`, with 95 % bootstrap intervals.

    Columns: target, unit, model, minus (the other one), difference, low, high (none for fewer than five test
    crystals), n (crystals), seeds (that both finished; see `paired_errors`).
    """
    text = runs.dropna(subset="text").groupby("model")["text"].first()
    rows = []
    for target in ordered_targets(settings):
        for model, other in compared_pairs(settings["models"]):
            unlike = f"crysmmnet_{'frozen' if text.get(model) == 'lora' else 'lora'}"
            if model in ("cast", "cast_scratch") and other == unlike:
                continue
            difference, seeds = paired_errors(results, runs, target, model, other)
            if difference.empty:
                continue
            mean, low, high = mean_interval(difference.to_numpy())
            row: dict[str, Any] = {"target": target, "unit": TARGETS[target].unit}
            row |= {"model": model, "minus": other}
            row |= {"difference": mean, "low": low, "high": high, "n": len(difference), "seeds": seeds}
            rows.append(row)
    columns = ["target", "unit", "model", "minus", "difference", "low", "high", "n", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def text_gain(results: Path, settings: dict[str, Any], runs: pd.DataFrame) -> pd.DataFrame:
    """Test error of cast minus that of structure_only, see `paired_errors`, by groups of crystals.

    Columns: target, unit, by ("all", "crystal system", "sites", "text"), group, difference, low, high (95 %
    bootstrap interval over the crystals; none for fewer than five), n, seeds (that both finished).
    """
    crystals = read_crystals(results)
    limit = read_json(results / "tokens" / "manifest.json")["max_tokens"]
    has_text, lengths = (crystals[name].to_numpy() for name in ("has_text", "n_tokens_full"))
    groupings: dict[str, tuple[Any, list[str]]] = {
        "all": (np.full(len(crystals), "all"), ["all"]),
        "crystal system": (crystals["crystal_system"].to_numpy(), list(CRYSTAL_SYSTEMS)),
        "sites": (site_groups(crystals["n_sites"].to_numpy()), site_labels()),
        "text": (
            np.select([~has_text, lengths > limit], ["none", "truncated"], "read to its end"),
            ["read to its end", "truncated", "none"],
        ),
    }
    rows = []
    for target in ordered_targets(settings):
        difference, seeds = paired_errors(results, runs, target, "cast", "structure_only")
        if difference.empty:
            continue
        for by, (groups, order) in groupings.items():
            of_crystal = pd.Series(groups, index=crystals.index).loc[difference.index]
            for group in order:
                values = difference[of_crystal == group].to_numpy()
                if not len(values):
                    continue
                mean, low, high = mean_interval(values)
                row: dict[str, Any] = {"target": target, "unit": TARGETS[target].unit}
                row |= {"by": by, "group": group}
                row |= {"difference": mean, "low": low, "high": high, "n": len(values), "seeds": seeds}
                rows.append(row)
    columns = ["target", "unit", "by", "group", "difference", "low", "high", "n", "seeds"]
    return pd.DataFrame(rows, columns=columns)
