"""What is read of runs and written of tables, without torch: for tables, figures and reports."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from castbench.labels import COMPOSITION_ORDER, MODELS, TARGET_ORDER
from castbench.provenance import atomic_path

WORKFLOW = Path(__file__).resolve().parents[3] / "workflow"
RESOURCES = WORKFLOW / "resources"


def ordered_targets(settings: dict[str, Any]) -> list[str]:
    """The configured targets in the paper's order."""
    return [target for target in TARGET_ORDER if target in settings["targets"]]


def ordered_models(settings: dict[str, Any]) -> list[str]:
    """The configured models in the paper's order."""
    return [model for model in MODELS if model in settings["models"]]


def ordered_composition_models(settings: dict[str, Any]) -> list[str]:
    """The models of the composition study that are trained, in its order."""
    chosen = {*settings["models"], *settings["structure_models"]}
    return [model for model in COMPOSITION_ORDER if model in chosen]


def read_edm_report() -> dict[str, float]:
    """The EDM report's own numbers by quantity."""
    table = pd.read_csv(RESOURCES / "paper" / "edm_report.csv")
    return dict(zip(table["quantity"], table["value"], strict=True))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is missing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_run(folder: Path) -> dict[str, Any]:
    """metrics.json of a run folder; status "missing" where there is none."""
    return read_json(folder / "metrics.json") or {"status": "missing", "reason": "no metrics.json"}


def read_errors(results: Path, target: str, model: str, seeds: list[int]) -> pd.Series:
    """Absolute test error of each crystal by id, mean over the finished seeds, in the target's unit."""
    folder = results / "runs" / target / model
    frames = []
    for seed in seeds:
        if read_json(folder / str(seed) / "metrics.json").get("status") == "finished":
            frame = pd.read_parquet(folder / str(seed) / "predictions.parquet")
            frames.append(frame[frame["split"] == "test"].set_index("material_id"))
    if not frames:
        return pd.Series(dtype=float)
    return pd.concat([(f["y_pred"] - f["y_true"]).abs() for f in frames]).groupby(level=0, sort=False).mean()


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table; six significant digits, whole numbers as such, nothing where a value is missing."""
    whole = [c for c in frame.select_dtypes("number") if (frame[c].dropna() % 1 == 0).all()]
    with atomic_path(path) as partial:
        frame.astype(dict.fromkeys(whole, "Int64")).to_csv(
            partial, index=False, float_format="%.6g", lineterminator="\n"
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
