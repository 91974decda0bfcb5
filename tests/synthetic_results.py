"""A results folder in the pipeline's formats, with invented numbers, for tests of evaluation and report."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from castbench.labels import MODELS, TARGETS
from castbench.materials.splits import write_split
from castbench.provenance import write_json

SETTINGS = {
    "dataset": "invented",
    "source": "demo",
    "targets": ["total_energy", "band_gap", "log_shear_modulus"],
    "models": list(MODELS),
    "seeds": [0, 1],
    "structure_encoder": "cogn",
    "text_encoder": "minilm",
    "max_tokens": 512,
    "sample": None,
    "filters": {"max_energy_above_hull": None, "ordered_moduli": True},
    "split": {"seed": 0, "fractions": [0.7, 0.1, 0.2], "group_by": None},
}
SPACEGROUPS = [225, 216, 221, 186, 136, 194, 62, 12, 2, 166]
N = 90


def split_of(index: int) -> str:
    """The split of the material at row `index`: 70 % train, 10 % validation, 20 % test."""
    return "train" if index % 10 < 7 else "validation" if index % 10 == 7 else "test"


def write_dataset(folder: Path, targets: list[str]) -> None:
    """Materials, funnel, splits, tables of graphs and tokens."""
    rng = np.random.default_rng(1)
    ids = [f"m-{i}" for i in range(N)]
    columns = {
        "material_id": ids,
        "formula": [f"Mg{i}O" for i in range(N)],
        "structure": [{"lattice": [1.0] * 9, "species": ["Mg"], "frac_coords": [0.0] * 3}] * N,
        "energy_per_atom": rng.normal(-5, 1, N),
        "formation_energy_per_atom": rng.normal(-1, 1, N),
        "energy_above_hull": rng.random(N) / 10,
        "band_gap": [None if i % 5 == 0 else float(i % 7) / 2 for i in range(N)],
        "g_vrh": [None if i % 3 == 0 else 10.0 + i for i in range(N)],
        "k_vrh": [None if i % 3 == 0 else 50.0 + i for i in range(N)],
        "origin": ["invented"] * N,
        "spacegroup": pa.array([SPACEGROUPS[i % len(SPACEGROUPS)] for i in range(N)], pa.int16()),
        "n_sites": pa.array([1 + i % 12 for i in range(N)], pa.int32()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "materials.parquet")
    write_json(
        folder / "materials" / "manifest.json",
        {
            "source": "demo",
            "files": [{"path": "somewhere/crystals.jsonl.zst", "sha256": "f" * 64, "bytes": 1}],
            "licence": "CC0-1.0",
            "citation": None,
            "n_read": N + 2,
            "n_kept": N,
            "by_reason": {"duplicate id": 2},
        },
    )
    funnel: dict = {"n_collected": N, "steps": [], "targets": {}, "rejected_by_reason": {"duplicate id": 2}}
    for target in targets:
        values = columns[TARGETS[target].column]
        chosen = [i for i in range(N) if values[i] is not None]
        steps = [
            {"filter": "max_energy_above_hull", "removed": 0, "left": N},
            {"filter": "target missing", "removed": N - len(chosen), "left": len(chosen)},
        ]
        funnel["targets"][target] = {"steps": steps, "n": len(chosen)}
        lists = {s: [ids[i] for i in chosen if split_of(i) == s] for s in ("train", "validation", "test")}
        write_split(folder / "splits" / f"{target}.json", {"target": target, "seed": 0}, lists)
    write_json(folder / "funnel.json", funnel)
    for part in ("graphs", "tokens"):
        (folder / part).mkdir(exist_ok=True)
    nodes = [1 + i % 4 for i in range(N)]
    pd.DataFrame({"material_id": ids, "status": "ok", "n_nodes": nodes, "n_edges": 24}).to_parquet(
        folder / "graphs" / "index.parquet"
    )
    lengths = [1 if i == 3 else 100 + 8 * i for i in range(N)]
    pd.DataFrame(
        {
            "material_id": ids,
            "n_tokens_full": lengths,
            "n_tokens": np.minimum(lengths, 512),
            "has_text": [i != 3 for i in range(N)],
        }
    ).to_parquet(folder / "tokens" / "index.parquet")
    write_json(
        folder / "graphs" / "manifest.json", {"settings": {"neighbours": 24}, "n_graphs": N, "n_failed": 0}
    )
    write_json(
        folder / "descriptions.json", {"success_rate": 1 - 1 / N, "by_status": {"ok": N - 1, "timeout": 1}}
    )
    write_json(
        folder / "tokens" / "manifest.json",
        {"encoder": {"id": "minilm-id", "revision": "abc"}, "max_tokens": 512, "share_truncated": 0.4},
    )


def write_run(folder: Path, settings: dict, target: str, model: str, seed: int, mae: float) -> None:
    """One finished run of `model`, whose test MAE is `mae`."""
    run = folder / "runs" / target / model / str(seed)
    split = json.loads((folder / "splits" / f"{target}.json").read_text())
    rng = np.random.default_rng(seed)
    frames = []
    for part in ("validation", "test"):
        truth = rng.normal(0, 2, len(split[part]))
        signs = rng.choice([-1.0, 1.0], len(truth))
        frames.append(
            pd.DataFrame(
                {"material_id": split[part], "split": part, "y_true": truth, "y_pred": truth + signs * mae}
            )
        )
    scores = {"mae": mae, "rmse": mae, "r2": 0.9}
    write_json(
        run / "metrics.json",
        {
            "status": "finished",
            "reason": None,
            "dataset": settings["dataset"],
            "model": model,
            "target": target,
            "seed": seed,
            "unit": TARGETS[target].unit,
            "n": {s: len(split[s]) for s in ("train", "validation", "test")},
            "n_without_text": 1,
            "test": scores,
            "validation": scores,
            "best_epoch": 3,
            "epochs": 5,
            "steps": 50,
            "parameters": {"total": 700_000, "trainable": 600_000},
            "text": "frozen",
            "pretrained": None,
            "target_mean": 0.0,
            "target_std": 1.0,
            "inputs": {"graphs": "a", "tokens": "b", "split": "c"},
            "versions": {"torch": "2.13.0"},
            "commit": "abc123",
        },
    )
    pd.concat(frames).to_parquet(run / "predictions.parquet")
    epochs = np.arange(1, 6)
    pd.DataFrame(
        {
            "epoch": epochs,
            "step": epochs * 10,
            "learning_rate": 1e-3,
            "train_loss": mae / epochs,
            "validation_loss": mae * (1 + np.abs(epochs - 3)),
            "validation_mae": mae * (1 + np.abs(epochs - 3)),
        }
    ).to_csv(run / "history.csv", index=False)
    write_json(run / "config.json", {"model": model})
    write_json(
        run / "cost.json",
        {
            "seconds": 12.5,
            "samples_per_second": 300.0,
            "peak_memory_mb": 900.0,
            "hardware": {"cpu": "Invented CPU", "cores": 2, "gpus": [], "threads": 1},
        },
    )


def write_pretraining(folder: Path, seeds: list[int]) -> None:
    """Records of both pretraining objectives."""
    for objective in ("masked_node", "contrastive"):
        for seed in seeds:
            run = folder / "pretrain" / objective / str(seed)
            scores: dict = {"loss": 0.4, "accuracy": 0.9}
            if objective == "masked_node":
                scores |= {"accuracy_shuffled_text": 0.3, "accuracy_without_text": 0.35}
            record = {"status": "finished", "objective": objective, "seed": seed, "epochs": 4}
            write_json(
                run / "metrics.json", {**record, "n": {"train": 60, "validation": 8}, "validation": scores}
            )
            write_json(
                run / "cost.json", {"seconds": 3.0, "samples_per_second": 100.0, "peak_memory_mb": 500.0}
            )


def write_results(folder: Path, settings: dict = SETTINGS) -> Path:
    """Everything up to the runs. Models get better in their order; `cast` is best, `cast_scratch` second."""
    write_dataset(folder, settings["targets"])
    for target in settings["targets"]:
        for place, model in enumerate(settings["models"]):
            for seed in settings["seeds"]:
                write_run(folder, settings, target, model, seed, mae=1.0 - 0.1 * place + 0.01 * seed)
    write_pretraining(folder, settings["seeds"])
    return folder
