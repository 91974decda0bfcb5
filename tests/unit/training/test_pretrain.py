import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file

from castbench.materials.splits import load_split, write_split
from castbench.models import build_pretraining
from castbench.models.base import Outcome
from castbench.provenance import sha256_file
from castbench.text.states import PackedStates
from castbench.text.tokens import PackedTokens
from castbench.training import pretrain
from castbench.training.dataset import Crystals
from castbench.training.objectives import MaskedNode
from castbench.training.pretrain import pretrain_model, shuffled_text, without_text
from training_jobs import bytes_of, killed_and_unbroken


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


def test_weights_follow_from_the_seed_alone(data, tmp_path):
    """And not from what else the process has drawn."""
    for i in range(2):
        torch.rand(i)
        splits = [data.root / "splits" / "total_energy.json"]
        pretrain_model(**arguments(data, "contrastive", tmp_path / str(i) / "0", splits))
    assert bytes_of(tmp_path / "0" / "0") == bytes_of(tmp_path / "1" / "0")


def test_a_record_says_what_was_read_and_caches_are_staged_where_that_is_asked_for(
    data, tmp_path, monkeypatch
):
    ids, paths = [f"m-{i}" for i in range(40)], data.caches("contrastive")
    lists = {"train": ids[12:30], "validation": ids[8:12], "test": ids[30:]}  # 11 has no text
    splits = [tmp_path / "a.json", tmp_path / "b.json"]
    for split, own in zip(splits, (lists, lists | {"train": ids[12:20]}), strict=True):
        write_split(split, {"target": split.stem}, own)
    staged = {paths[name]: tmp_path / name for name in ("graphs", "tokens", "states")}
    for cache, copy in staged.items():
        shutil.copytree(cache, copy)
    monkeypatch.setattr(pretrain, "stage_cache", lambda cache: staged.pop(cache))
    given = arguments(data, "contrastive", tmp_path / "0", splits)
    pretrain_model(**given, stage=1)
    assert not staged
    found, config = (
        json.loads((tmp_path / "0" / name).read_text()) for name in ("metrics.json", "config.json")
    )
    read = {name: sha256_file(paths[name] / "manifest.json") for name in ("graphs", "tokens", "states")}
    assert found["inputs"] == read | {"splits": [load_split(split)["checksum"] for split in splits]}
    assert found["n"] == {"train": 18, "validation": 4} and found["n_without_text"] == 1
    assert config == given["settings"] | {"objective": "contrastive", "seed": 0}


def test_controls_have_the_names_of_what_they_do(data, tmp_path, monkeypatch):
    for name in ("shuffled_text", "without_text"):
        monkeypatch.setattr(pretrain, name, lambda *_, name=name: name)
    accuracy = {None: 0.5, "shuffled_text": 0.3, "without_text": 0.1}
    monkeypatch.setattr(MaskedNode, "evaluate", lambda self, net, alter=None: (1.0, accuracy[alter]))
    splits = [data.root / "splits" / "total_energy.json"]
    pretrain_model(**arguments(data, "masked_node", tmp_path / "0", splits))
    found = json.loads((tmp_path / "0" / "metrics.json").read_text())["validation"]
    assert found["accuracy"] == 0.5 and found["loss"] == 1.0
    assert (found["accuracy_shuffled_text"], found["accuracy_without_text"]) == (0.3, 0.1)


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


def test_an_encoder_that_is_tuned_reads_the_altered_texts(data):
    architecture = data.settings("masked_node")["architecture"]
    architecture = architecture | {
        "lora": architecture["lora"] | {"layers": "all"},
        "cross_attention": architecture["cross_attention"] | {"text": "lora"},
    }
    network = build_pretraining("masked_node", architecture, data.root / "encoder").eval()
    device = torch.device("cpu")
    crystals = Crystals(network, data.root / "graphs", data.root / "tokens", None, device)
    rows = torch.arange(8, 12)
    settings = data.settings("masked_node")["pretraining"]
    objective, batch = MaskedNode(crystals, torch.arange(6), rows, settings, 0), crystals.batch(rows)
    own, given = of_each(batch), of_each(shuffled_text(objective)(batch, rows))
    for alter, others in (
        (shuffled_text(objective), rows[[own.index(text) for text in given]]),
        (without_text(objective, network, data.root / "encoder"), torch.full((4,), 11)),
    ):
        altered, expected = alter(batch, rows), crystals.batch(others)
        assert altered.token_ids.tolist() == expected.token_ids.tolist()
        torch.testing.assert_close(network.text(altered), network.text(expected))


def of_each(batch):
    """Token ids of each crystal's text."""
    return [part.tolist() for part in batch.token_ids.tensor_split(batch.token_offsets[1:-1])]


def test_losses_and_accuracies_are_means_over_all_guesses(task):
    """Of batches with different numbers of them."""
    objective, _ = task
    outcomes = iter([(1.0, 1.0, 4), (2.0, 9.0, 12)])

    class Guessing(torch.nn.Module):
        def forward(self, batch):
            return Outcome(*map(torch.tensor, next(outcomes)))

    assert objective.evaluate(Guessing()) == (28 / 16, 10 / 16)


def test_nodes_are_hidden_with_the_probability_of_the_config_and_anew_in_each_step(task, data):
    objective, network = task
    settings = data.settings("masked_node")["pretraining"]
    rows = torch.arange(8, 40)
    seen = []
    network.forward = lambda batch: seen.append(batch.masked_nodes) or Outcome(*torch.ones(3))
    for probability, seed, step in ((1.0, 0, 0), (0.5, 0, 0), (0.5, 0, 1), (0.5, 1, 0)):
        own = settings | {"mask_probability": probability}
        MaskedNode(objective.crystals, rows, rows, own, seed).loss(network, rows, step)
    assert seen[0].all() and not seen[1].all()
    assert not torch.equal(seen[1], seen[2]) and not torch.equal(seen[1], seen[3])


def test_masks_of_validation_are_the_same_each_time(task):
    objective, network = task
    assert objective.evaluate(network.eval()) == objective.evaluate(network.eval())
