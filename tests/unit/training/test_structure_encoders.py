"""Training with structure encoders other than coGN, whose checkpoints hold batch statistics too."""

import json
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from castbench.graphs.kinds import KINDS, structure_graph
from castbench.graphs.packed import PackedWriter
from castbench.labels import STRUCTURE_ENCODERS
from castbench.provenance import sha256_file
from crystals import varied_crystals
from training_jobs import bytes_of, run_job, run_together

SIZES = {
    "congn": {"width": 8, "depth": 1},
    "alignn": {"width": 8, "embedding": 8, "alignn_layers": 1, "gcn_layers": 1},
    "cgcnn": {"width": 8, "layers": 2, "hidden": 8},
    "megnet": {"width": 8, "hidden": 8, "blocks": 2, "vector": 4, "passes": 2},
}


@pytest.fixture
def data_with(data, tmp_path):
    """Function encoder -> the data set with its graphs, of crystals in the place of the random ones."""

    def make(encoder):
        root = tmp_path / "data"
        shutil.copytree(data.root, root, ignore=shutil.ignore_patterns("graphs", "runs", "pretrain"))
        settings = {"structure_encoder": encoder, "neighbours": 12, "symprec": 1e-4}
        graphs = [
            structure_graph(s.lattice.matrix, s.frac_coords, np.array(s.atomic_numbers), settings)
            for s in varied_crystals()
        ]
        ids = [f"m-{i}" for i in range(40)]
        source = sha256_file(root / "materials.parquet")
        with PackedWriter(root / "graphs", settings, source, KINDS[encoder].arrays) as writer:
            writer.append(ids, [graphs[i % len(graphs)] for i in range(len(ids))])
        return type(data)(root)

    return make


def with_encoder(command, encoder):
    """The command line with that encoder's sizes in place of coGN's."""
    place = command.index("--settings") + 1
    settings = json.loads(command[place])
    del settings["architecture"]["cogn"]
    settings["architecture"][encoder] = SIZES[encoder]
    return [*command[:place], json.dumps(settings), *command[place + 1 :]]


@pytest.mark.parametrize(
    ("model", "encoder"),
    [
        ("structure_only", "congn"),
        ("crysmmnet_frozen", "alignn"),
        ("cast_scratch", "cgcnn"),
        ("structure_only", "megnet"),
    ],
)
def test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one(data_with, tmp_path, model, encoder):
    data = data_with(encoder)
    whole, killed = (with_encoder(data.train(model, tmp_path / name / model), encoder) for name in "ab")
    assert run_job(whole) == 0
    assert run_job(killed, interval=0, stop=6) == -signal.SIGKILL
    assert run_job(killed, interval=0) == 0
    runs = [tmp_path / name / model / "0" for name in "ab"]
    assert bytes_of(runs[0]) == bytes_of(runs[1])
    record = json.loads((runs[0] / "metrics.json").read_text())
    assert record["status"] == "finished" and record["test"]["mae"] > 0
    if model == "structure_only":
        label, source = STRUCTURE_ENCODERS[encoder]
        card = (runs[0] / "README.md").read_text()
        assert f"\n# {label}, " in card and f"{label} ({source}). Input: graph." in card
        assert "coGN" not in card.partition("## Departures")[0]
    weights = load_file(runs[0] / "model.safetensors")
    running = [name for name in weights if name.endswith("running_var")]
    assert bool(running) == (encoder in ("alignn", "cgcnn"))
    assert all((weights[name] != 1).any() for name in running if "edge_norm" not in name)


def test_masked_nodes_are_predicted_with_batch_normalisation(data_with, tmp_path):
    data = data_with("cgcnn")
    command = with_encoder(data.pretrain("masked_node", tmp_path / "pretrain" / "0"), "cgcnn")
    assert run_job(command) == 0
    record = json.loads((tmp_path / "pretrain" / "0" / "metrics.json").read_text())
    assert record["status"] == "finished" and 0 <= record["validation"]["accuracy"] <= 1


def test_two_processes_train_batch_normalisation_with_the_losses_of_one(data_with, tmp_path):
    data = data_with("cgcnn")
    assert run_job(with_encoder(data.train("structure_only", tmp_path / "one"), "cgcnn")) == 0
    commands = [data.train("structure_only", tmp_path / name, devices=2) for name in ("two", "nothing")]
    assert run_together([with_encoder(command, "cgcnn") for command in commands]) == [0, 0]
    # Not those of validation: a bias before batch normalisation has rounding for a gradient, of which Adam
    # makes steps, and the running mean follows them late.
    two, one = (pd.read_csv(tmp_path / name / "0" / "history.csv")["train_loss"] for name in ("two", "one"))
    pd.testing.assert_series_equal(two, one, rtol=1e-5, atol=1e-5)
