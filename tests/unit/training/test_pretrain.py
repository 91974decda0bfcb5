import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file

from castbench.materials.splits import write_split
from castbench.models import build_pretraining
from castbench.text.states import PackedStates
from castbench.text.tokens import PackedTokens
from castbench.training.dataset import Crystals
from castbench.training.objectives import MaskedNode
from castbench.training.pretrain import pretrain_model, shuffled_text, without_text
from training_jobs import killed_and_unbroken


@pytest.mark.parametrize(("objective", "steps"), [("masked_node", 12), ("contrastive", 9)])
def test_killed_at_ten_random_points_a_pretraining_ends_with_the_bytes_of_an_unbroken_one(
    data, tmp_path, objective, steps
):
    killed, unbroken = killed_and_unbroken(
        lambda folder: data.pretrain(objective, folder / "0"), tmp_path, "0", steps
    )
    assert set(unbroken) == {
        "README.md", "config.json", "history.csv", "metrics.json", "model.safetensors",
    }  # fmt: skip
    assert killed == unbroken
    assert list((tmp_path / "killed0" / "checkpoints" / "0").iterdir())

    found = json.loads(killed["metrics.json"])
    assert found["steps"] == steps
    controls = {"accuracy_shuffled_text", "accuracy_without_text"} if objective == "masked_node" else set()
    assert set(found["validation"]) == {"loss", "accuracy"} | controls
    assert (found["status"], found["objective"], found["text"]) == ("finished", objective, "frozen")
    assert found["n"] == {"train": 27, "validation": 6}
    weights = load(killed["model.safetensors"])
    assert sum(value.numel() for value in weights.values()) == found["parameters"]["trainable"]


def arguments(data, objective, output, splits):
    """Arguments of pretrain_model, called in this process."""
    return {
        "settings": data.settings(objective),
        "objective": objective,
        "seed": 0,
        **data.caches(objective),
        "splits": splits,
        "output": output,
        "threads": 1,
    }


def test_no_validation_or_test_crystal_of_any_target_is_trained_on(data, tmp_path, monkeypatch):
    """Also where the splits, which may be the user's own, overlap."""
    ids = [f"m-{i}" for i in range(40)]
    lists = {
        "a": {"train": ids[:24], "validation": ids[24:30], "test": ids[30:]},
        "b": {"train": ids[20:36], "validation": ids[36:38], "test": ids[:3]},
    }
    for target, own in lists.items():
        write_split(tmp_path / f"{target}.json", {"target": target}, own)
    seen = []
    original = MaskedNode.loss
    monkeypatch.setattr(
        MaskedNode,
        "loss",
        lambda self, net, rows, step: (seen.extend(rows.tolist()), original(self, net, rows, step))[1],
    )
    pretrain_model(
        **arguments(data, "masked_node", tmp_path / "0", [tmp_path / "a.json", tmp_path / "b.json"])
    )
    assert set(seen) == set(range(3, 24)) - {7}  # 7 has no graph
    assert json.loads((tmp_path / "0" / "metrics.json").read_text())["n"] == {"train": 20, "validation": 6}


def test_pretraining_is_skipped_where_every_target_is(data, tmp_path):
    lists = {"train": ["m-1"], "validation": [], "test": []}
    write_split(tmp_path / "a.json", {"target": "a"}, lists, "1 crystals, and 20 are the fewest to train on")
    pretrain_model(**arguments(data, "contrastive", tmp_path / "0", [tmp_path / "a.json"]))
    found = json.loads((tmp_path / "0" / "metrics.json").read_text())
    assert (found["status"], found["reason"]) == ("skipped", "no target has enough crystals")
    assert load_file(tmp_path / "0" / "model.safetensors") == {}


@pytest.fixture
def task(data):
    network = build_pretraining(
        "masked_node", data.settings("masked_node")["architecture"], data.root / "encoder"
    )
    paths = {name: path for name, path in data.caches("masked_node").items() if name != "encoder"}
    crystals = Crystals(network, **paths, device=torch.device("cpu"))
    settings = data.settings("masked_node")["pretraining"]
    return MaskedNode(crystals, torch.arange(6), torch.arange(8, 20), settings, 0), network


def test_shuffled_text_is_that_of_another_validation_crystal(data, task):
    objective, _ = task
    tokens = PackedTokens.open(data.root / "tokens")
    states = PackedStates.open(data.root / "text_states" / "0").states
    own = [states[slice(*tokens.token_offsets[row : row + 2])] for row in range(40)]
    batch = objective.crystals.batch(objective.validation)
    altered = shuffled_text(objective)(batch, objective.validation)
    donors = []
    for place in range(12):
        given = altered.token_states[slice(*altered.token_offsets[place : place + 2].tolist())]
        given = given.view(torch.uint16).numpy()
        donors += [row for row in range(8, 20) if np.array_equal(own[row], given)]
    assert sorted(donors) == list(range(8, 20))
    assert all(donor != row for donor, row in zip(donors, range(8, 20), strict=True))
    assert torch.equal(altered.atomic_numbers, batch.atomic_numbers)


def test_without_text_is_the_state_of_a_crystal_that_has_none(data, task):
    objective, network = task
    rows = torch.tensor([9, 10, 12])
    batch = without_text(objective, network, data.root / "encoder")(objective.crystals.batch(rows), rows)
    empty = objective.crystals.batch(torch.tensor([11]))  # the one without a description
    assert batch.token_offsets.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(batch.token_states, empty.token_states.expand(3, -1), rtol=2**-7, atol=1e-4)


def test_masks_of_validation_are_the_same_each_time(task):
    objective, network = task
    assert objective.evaluate(network.eval()) == objective.evaluate(network.eval())
