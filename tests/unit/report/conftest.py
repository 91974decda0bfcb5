import json

import numpy as np
import pandas as pd
import pytest

import synthetic_results
from castbench.evaluation.aggregate import aggregate_runs
from castbench.report.figures import plot_attention, plot_dataset, plot_results


def write_attention(results, models=("cast_scratch", "cast")):
    """Invented maps: without pretraining the three nodes read the same, with it each its own."""
    rng = np.random.default_rng(0)
    pieces = ["[CLS]", "mg", "##o", "is", "halite", "[SEP]"]
    maps = {"target": "total_energy", "seed": 0, "material_id": "m-8", "formula": "MgO", "split": "test"}
    maps |= {
        "nodes": ["Mg1", "O1", "O2"],
        "pieces": pieces,
        "words": ["[CLS]", "mgo", "is", "halite", "[SEP]"],
    }
    maps |= {"word_of_piece": [0, 1, 1, 2, 3, 4], "models": {}, "similarity": {}}
    counts = []
    for model, mean in zip(("cast_scratch", "cast"), (0.95, 0.6), strict=True):
        if model in models:
            maps["models"][model] = rng.dirichlet(np.ones(6), (2, 4, 3)).round(5).tolist()
            summary = {"crystals": 5, "one_node": 2, "pairs": 15, "mean_by_layer": [mean, mean]}
            maps["similarity"][model] = summary
            counts += [
                {"model": model, "layer": layer, "head": head, "low": mean, "count": 15}
                for layer in (1, 2)
                for head in (-1, 1, 2, 3, 4)
            ]
    folder = results / "attention"
    folder.mkdir(exist_ok=True)
    (folder / "maps.json").write_text(json.dumps(maps))
    columns = ["model", "layer", "head", "low", "count"]
    pd.DataFrame(counts, columns=columns).to_parquet(folder / "similarity.parquet")


@pytest.fixture(scope="session")
def settings():
    targets = ["total_energy", "band_gap"]
    models = ["structure_only", "crysmmnet_frozen", "multimat", "cast_scratch", "cast"]
    return synthetic_results.SETTINGS | {"targets": targets, "models": models}


@pytest.fixture(scope="session")
def config(settings):
    """The part of a configuration that the report reads."""
    keys = ("dataset", "targets", "models", "text_encoder")
    config = {key: settings[key] for key in keys} | {"structure_encoder": "cogn"}
    return config | {
        "materials": {"source": "demo", "path": "somewhere/crystals.jsonl.zst"},
        "training": {"seeds": settings["seeds"]},
    }


@pytest.fixture(scope="session")
def results(tmp_path_factory, settings):
    """Invented results, with tables and figures: read only."""
    results = synthetic_results.write_results(tmp_path_factory.mktemp("report") / "results", settings)
    aggregate_runs(settings, results, results / "tables")
    write_attention(results)
    for plot in (plot_dataset, plot_results, plot_attention):
        plot(settings, results, results / "figures")
    return results
