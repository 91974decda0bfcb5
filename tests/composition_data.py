"""A small invented set of ABX3 compounds as a user's CSV, and what the first stages make of it."""

import csv
import itertools
from pathlib import Path
from typing import Any

from castbench.compositions.collect import aggregate_compositions, collect_compositions
from castbench.compositions.splits import split_compositions

CATIONS_A, CATIONS_B, ANIONS = ("Cs", "Rb", "K", "Ba"), ("Sn", "Ca", "Ti"), ("O", "Cl", "Br")
CLASSES = {"stability": 0.0}

ARCHITECTURE = {
    "edm_transformer": {"width": 24, "layers": 1, "heads": 2, "feedforward": 24, "dropout": 0.1},
    "crabnet": {"width": 24, "layers": 1, "heads": 2, "feedforward": 24, "dropout": 0.1},
    "random_forest": {"trees": 10},
}
TRAINING: dict[str, Any] = {
    "epochs": 4, "patience": None, "batch_size": 8, "learning_rate": 1e-3, "encoder_learning_rate": 1e-4,
    "weight_decay": 1e-2, "warmup_steps": 1000, "cycles": 1, "task_weights": "sum", "precision": "32-true",
    "device": "cpu", "threads": 1,
}  # fmt: skip


def composition_settings(loss: str = "inverse_frequency", **training: Any) -> dict[str, Any]:
    """Settings of a small model on `rows`."""
    return {
        "dataset": "invented", "max_elements": 4, "regression": ["band_gap"], "loss": loss,
        "classification": {"stability": 0.0}, "architecture": ARCHITECTURE, "training": TRAINING | training,
    }  # fmt: skip


def rows() -> list[dict[str, str]]:
    """36 formulas, the first with a second polymorph; a third of the formulas is stable."""
    found = []
    for i, (a, b, x) in enumerate(itertools.product(CATIONS_A, CATIONS_B, ANIONS)):
        hull = 0.0 if i % 3 == 0 else 0.02 * i
        found.append({"id": f"m-{i}", "formula": f"{a}{b}{x}3", "hull": str(hull), "gap": str(0.1 * i)})
    polymorph = {"id": "m-first", "formula": "SnCsO3", "hull": "0.3", "gap": "2.5"}
    return [polymorph, *found]


def write_csv(path: Path, content: list[dict[str, str]]) -> Path:
    """A CSV file of `content`."""
    with path.open("w", newline="") as handle:
        table = csv.DictWriter(handle, list(content[0]))
        table.writeheader()
        table.writerows(content)
    return path


def collected(folder: Path, content: list[dict[str, str]], **settings) -> Path:
    """Run collect_compositions on rows; returns the folder."""
    path = write_csv(folder / "own.csv", content)
    columns = {"material_id": "id", "energy_above_hull": "hull", "band_gap": "gap"}
    settings = {"source": "local", "path": str(path), "columns": columns, "max_elements": 4} | settings
    collect_compositions(settings, folder / "polymorphs.parquet", folder / "manifest.json")
    return folder


def aggregated(folder: Path, content: list[dict[str, str]]) -> Path:
    """Run the stages up to compositions.parquet; returns the folder."""
    collected(folder, content)
    aggregate_compositions(folder / "polymorphs.parquet", folder / "compositions.parquet")
    return folder


def split(folder: Path, **settings) -> None:
    """Run split_compositions in a folder of `aggregated`."""
    given = {"seed": 0, "fractions": [0.6, 0.2, 0.2], "regression": ["band_gap"], "classification": CLASSES}
    settings = given | settings
    split_compositions(
        settings, folder / "polymorphs.parquet", folder / "compositions.parquet", folder / "split.json"
    )
