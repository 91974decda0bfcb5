import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save

import synthetic_results
from castbench.evaluation.aggregate import aggregate_runs
from castbench.evaluation.attention import BY_MATERIAL
from castbench.evaluation.evidence import tabulate_evidence
from castbench.evaluation.probes import SCHEMA
from castbench.provenance import write_json
from castbench.report.attention import plot_attention, plot_evidence
from castbench.report.figures import plot_dataset, plot_results
from castbench.text.reading import LABELS


def write_attention(results, models=("cast_scratch", "cast")):
    """Invented maps and probes: without pretraining the three nodes read the same, with it each its own."""
    rng = np.random.default_rng(0)
    words = ["[CLS]", "MgO", "is", "Halite", "structured", "and", "crystallizes", "[SEP]"]
    entries = [
        {
            "material_id": material, "formula": formula, "split": "test", "why": why, "nodes": nodes,
            "multiplicities": [1] * len(nodes), "words": words, "parts": [8, 0, 1, 1, 1, 1, 2, 8],
            "tokens": 11, "tokens_full": 11,
        }
        for material, formula, why, nodes in (
            ("m-8", "MgO", "most nodes", ["Mg1", "O1", "O2"]),
            ("m-9", "Al2Te5", "largest error of CAST", ["Al1", "Te1"]),
        )
    ]  # fmt: skip
    maps = {"target": "total_energy", "labels": LABELS, "models": list(models), "note": None}
    maps |= {"seeds": dict.fromkeys(models, 0)}
    arrays, counts, by_material = {}, [], []
    for model, mean in zip(("cast_scratch", "cast"), (0.95, 0.6), strict=True):
        if model not in models:
            continue
        for entry in entries:
            shape = (2, 4, len(entry["nodes"]))
            weights = rng.dirichlet(np.ones(len(words)), shape).astype(np.float32)
            arrays[f"{model}/{entry['material_id']}"] = weights
        for layer in (1, 2):
            counts += [
                {"model": model, "seed": seed, "layer": layer, "head": head, "low": mean, "count": 15}
                for head in (-1, 1, 2, 3, 4)
                for seed in (0, 1)
            ]
            for i, seed in ((i, seed) for i in range(7) for seed in (0, 1)):
                value = mean + 0.01 * i if i > 1 else float("nan")
                sizes = (3 if i > 1 else 1, 11)
                by_material.append((model, seed, f"m-{i}", layer, *sizes, value, value, 9.5, 8.5))
    folder = results / "attention"
    (folder / "probes").mkdir(parents=True, exist_ok=True)
    write_json(folder / "maps.json", maps | {"materials": entries if models else []})
    (folder / "maps.safetensors").write_bytes(save(arrays))
    columns = ["model", "seed", "layer", "head", "low", "count"]
    pd.DataFrame(counts, columns=columns).to_parquet(folder / "similarity.parquet")
    pd.DataFrame(by_material, columns=BY_MATERIAL.names).to_parquet(folder / "by_material.parquet")
    text = {key: entries[0][key] for key in ("material_id", "formula", "words", "parts", "tokens")}
    text |= {"labels": LABELS, "encoder": {"id": "bert", "revision": "1"}, "text": " ".join(words[1:-1])}
    write_json(folder / "text.json", text | {"weights": rng.dirichlet(np.ones(8), (6, 3)).tolist()})
    for model in (*(m for m in ("crysmmnet_frozen", *models)), "masked_node"):
        write_probes(folder / "probes" / f"{model}.parquet", rng)
    probed = [*(m for m in ("crysmmnet_frozen", *models)), "masked_node"]
    own = {"target": "total_energy", "probed": probed, "compared": len(models) > 1}
    tabulate_evidence(own, folder, results / "tables" / "evidence.csv")


def write_probes(file, rng):
    """Invented answers of a model to other texts of seven crystals."""
    asked = [("own", None, 0.0), ("none", None, 1.0), ("another crystal's", None, 1.0)]
    asked += [
        ("sentences shuffled", None, 0.0),
        ("only formula", None, None),
        ("rank correlation", None, None),
    ]
    for part in ("formula", "mineral", "symmetry", "[CLS], [SEP]"):
        asked += [("attention", part, 0.2), ("attribution", part, 0.2)]
        asked += [("without", part, 0.2), ("random", part, 0.2)] if part[0] != "[" else []
    asked += [(f"delete {o}", None, s) for o in ("attended", "attributed", "random") for s in (0.5, 1.0)]
    rows = [
        (seed, f"m-{i}", condition, part, share, 0, rng.random(), 1.0)
        for i in range(7)
        for seed in (0, 1)
        for condition, part, share in asked
    ]
    pd.DataFrame(rows, columns=SCHEMA.names).to_parquet(file)


@pytest.fixture(scope="session")
def settings():
    targets = ["total_energy", "band_gap"]
    models = ["structure_only", "crysmmnet_frozen", "multimat", "cast_scratch", "cast"]
    return synthetic_results.SETTINGS | {"targets": targets, "models": models}


@pytest.fixture(scope="session")
def config(settings):
    """The part of a configuration that the report reads."""
    keys = ("dataset", "targets", "models", "structure_encoder", "text_encoder", "max_tokens")
    config = {key: settings[key] for key in keys}
    materials = {key: settings[key] for key in ("source", "sample", "filters", "split")}
    return config | {
        "materials": materials | {"path": "somewhere/crystals.jsonl.zst"},
        "training": {"seeds": settings["seeds"]},
    }


@pytest.fixture(scope="session")
def results(tmp_path_factory, settings):
    """Invented results, with tables and figures: read only."""
    results = synthetic_results.write_results(tmp_path_factory.mktemp("report") / "results", settings)
    aggregate_runs(settings, results, results / "tables")
    write_attention(results)
    for plot in (plot_dataset, plot_results, plot_attention, plot_evidence):
        plot(settings, results, results / "figures")
    return results
