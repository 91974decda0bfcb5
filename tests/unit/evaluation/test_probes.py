import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from castbench.evaluation.attention import BY_MATERIAL
from castbench.evaluation.evidence import tabulate_evidence
from castbench.evaluation.probes import (
    DRAWS,
    SCHEMA,
    SHARES,
    Subject,
    probe_text,
    shuffle_sentences,
    spearman,
)
from castbench.evaluation.records import read_run
from castbench.evaluation.text_attention import extract_text_attention
from castbench.provenance import write_json
from castbench.text.reading import LABELS, SPECIAL, Reader
from castbench.training.dataset import Crystals
from castbench.training.objectives import random_mask
from small_study import MASKED, SEEDS, TEXTS

TESTED = ["m-1", "m-2", "m-3", "m-4", "m-5", "m-6"]  # m-0 has no text, m-7 no graph
MODELS = ("cast", "crysmmnet_frozen", "crysmmnet_lora", "text_only", "masked_node")


def runs_of(study, model):
    if model == "masked_node":
        return study / "pretrain" / "masked_node"
    return study / "runs" / "band_gap" / model


def probe(study, encoder, model, output, crystals=None, runs=None):
    probe_text(
        {"probes": crystals}, runs or runs_of(study, model), SEEDS, study / "materials.parquet",
        study / "splits" / "band_gap.json", study / "descriptions.parquet", study / "graphs",
        study / "tokens", encoder, output,
    )  # fmt: skip
    return pd.read_parquet(output)


@pytest.fixture(scope="module")
def folder(study, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    for model in MODELS:
        probe(study, encoder, model, folder / "probes" / f"{model}.parquet")
    return folder


def read(folder, model):
    return pd.read_parquet(folder / "probes" / f"{model}.parquet")


def subject_of(study, encoder, model):
    run = runs_of(study, model) / "0"
    return Subject(run, read_run(run), study / "graphs", study / "tokens", encoder)


@pytest.mark.parametrize("model", MODELS)
def test_every_test_crystal_with_graph_and_text_is_asked_everything(folder, model):
    frame = read(folder, model)
    assert sorted(frame["seed"].unique()) == SEEDS
    frame = frame[frame["seed"] == 1]
    assert sorted(frame["material_id"].unique()) == TESTED
    counts = frame.groupby("condition").size()
    assert counts["own"] == counts["none"] == counts["another crystal's"] == len(TESTED)
    assert counts["random"] == DRAWS * counts["without"]
    if model != "masked_node":
        assert counts["delete attended"] == len(SHARES) * len(TESTED)
        assert counts["delete random"] == DRAWS * len(SHARES) * len(TESTED)


@pytest.mark.parametrize("model", ["cast", "crysmmnet_frozen"])
def test_the_own_text_gives_the_models_prediction(study, encoder, folder, model):
    """In the target's unit, and up to the rounding of the cached states."""
    from castbench.evaluation.trained import load_run

    network = load_run(runs_of(study, model) / "1", encoder)
    crystals = Crystals(
        network, study / "graphs", study / "tokens", study / "text_states" / "0", torch.device("cpu")
    )
    rows, _ = crystals.rows(TESTED)
    with torch.no_grad():
        expected = network(crystals.batch(rows)).numpy() * 3.0 + 2.0
    own = read(folder, model).query("condition == 'own' and seed == 1").set_index("material_id").loc[TESTED]
    assert own["value"].to_numpy() == pytest.approx(expected, abs=5e-3)
    assert own["truth"].to_numpy() == pytest.approx(np.linspace(0, 3, 10)[1:7])


def test_without_any_token_only_cls_and_sep_are_left_whatever_the_order(folder):
    frame = read(folder, "cast").query("seed == 0")
    last = frame[(frame["share"] == 1.0) & frame["condition"].str.startswith("delete")]
    assert (last.groupby("material_id")["value"].agg(np.ptp) < 1e-5).all()
    empty = frame[frame["condition"] == "none"].set_index("material_id")["value"]
    assert (last.groupby("material_id")["value"].first() - empty).abs().max() > 1e-6  # [SEP] is a token


def test_texts_are_read_anew(study, encoder):
    """Taking tokens out changes the states of those that stay."""
    subject = subject_of(study, encoder, "crysmmnet_frozen")
    reading = Reader.of(study / "tokens", encoder).read(TEXTS[0])
    shorter = np.delete(reading.ids, reading.inner[3:9])
    with torch.no_grad():
        states = [subject.network.text(subject.batch(1, [ids]))[1] for ids in (reading.ids, shorter)]
    assert not torch.allclose(*states, atol=1e-3)


def test_masses_of_attention_and_gradients_add_up(folder):
    for model in ("cast", "crysmmnet_lora"):
        frame = read(folder, model).query("seed == 0")
        for condition in ("attention", "attribution"):
            chosen = frame[frame["condition"] == condition]
            assert (chosen.groupby("material_id")["value"].sum() - 1).abs().max() < 1e-5
            assert set(chosen["part"]) == set(LABELS)
        shares = frame[frame["condition"] == "attention"].groupby("material_id")["share"].sum()
        assert (shares - 1).abs().max() < 1e-5


def test_attention_is_that_of_the_model(study, encoder):
    subject = subject_of(study, encoder, "cast")
    reading = Reader.of(study / "tokens", encoder).read(TEXTS[0])
    with torch.no_grad():
        _, maps = subject.network.attention_maps(subject.batch(2, [reading.ids]))
    expected = torch.stack([weights[0].mean(dim=(0, 1)) for weights in maps]).mean(0)
    assert subject.attention(2, reading) == pytest.approx(expected.numpy(), abs=1e-6)


@pytest.mark.parametrize("model", ["cast", "text_only"])
def test_gradients_add_up_to_the_difference_from_a_blank_text(study, encoder, model):
    subject = subject_of(study, encoder, model)
    reading = Reader.of(study / "tokens", encoder).read(TEXTS[1])
    blank = np.where(reading.part == SPECIAL, reading.ids, subject.pad_id)
    with torch.no_grad():
        values = [subject.network(subject.batch(3, [ids])).item() for ids in (reading.ids, blank)]
    found = subject.attribution(3, reading)
    assert found.sum() == pytest.approx(values[0] - values[1], abs=0.02 * np.abs(found).sum())
    assert found[0] == found[-1] == 0


def test_hidden_nodes_are_counted(study, encoder, folder):
    frame = read(folder, "masked_node")
    assert frame["truth"].between(1, 4).all() and (frame["value"] <= frame["truth"]).all()
    assert (frame.groupby("material_id")["truth"].agg(np.ptp) == 0).all()
    crystals = subject_of(study, encoder, "masked_node").crystals
    for row, material_id in enumerate(crystals.material_ids):  # the share of pretraining, of each crystal
        if material_id in set(frame["material_id"]):
            mask = random_mask(crystals.batch(torch.tensor([row])).node_offsets, MASKED, "probe", row)
            assert (frame.loc[frame["material_id"] == material_id, "truth"] == mask.sum().item()).all()


def test_a_sample_is_drawn_and_a_run_without_result_is_empty(study, encoder, tmp_path):
    frame = probe(study, encoder, "text_only", tmp_path / "a.parquet", crystals=2)
    assert frame["material_id"].nunique() == 2 and sorted(frame["seed"].unique()) == SEEDS
    assert (frame.groupby("material_id")["seed"].nunique() == 2).all(), "every seed is asked about the same"
    write_json(tmp_path / "runs" / "0" / "metrics.json", {"status": "failed"})
    assert probe(study, encoder, "cast", tmp_path / "b.parquet", runs=tmp_path / "runs").empty
    shutil.copytree(runs_of(study, "cast") / "1", tmp_path / "runs" / "1")
    assert set(probe(study, encoder, "cast", tmp_path / "c.parquet", runs=tmp_path / "runs")["seed"]) == {1}


def test_the_same_bytes_again(study, encoder, folder, tmp_path):
    probe(study, encoder, "cast", tmp_path / "cast.parquet")
    assert (tmp_path / "cast.parquet").read_bytes() == (folder / "probes" / "cast.parquet").read_bytes()


def test_sentences_are_moved_whole(encoder):
    reading = Reader(encoder, 512, normalise=False).read(TEXTS[0])
    ids = shuffle_sentences(reading, np.random.default_rng(3))
    assert sorted(ids) == sorted(reading.ids) and (ids[0], ids[-1]) == (reading.ids[0], reading.ids[-1])
    sentences = [tuple(reading.ids[reading.sentence == n]) for n in range(4)]
    text = tuple(ids[1:-1])
    assert not np.array_equal(ids, reading.ids)
    for sentence in sentences:
        assert any(text[i : i + len(sentence)] == sentence for i in range(len(text)))


def test_spearman():
    assert spearman(np.array([1.0, 2, 3]), np.array([1.0, 10, 100])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert np.isnan(spearman(np.ones(3), np.arange(3)))


def evidence_of(*probed, compared=False):
    return {"target": "band_gap", "probed": probed, "compared": compared}


def test_attention_is_compared_on_the_seeds_that_both_have(tmp_path):
    """A value that depends on the seed alone: pretraining changes nothing."""
    (tmp_path / "probes").mkdir()
    rows = [
        (model, seed, f"m-{i}", 1, 3, 9, 0.3 * seed, 0.3 * seed, 5.0, 5.0)
        for model, seeds in (("cast", (0, 1)), ("cast_scratch", (1, 2)))
        for seed in seeds
        for i in range(6)
    ]
    pd.DataFrame(rows, columns=BY_MATERIAL.names).to_parquet(tmp_path / "by_material.parquet")
    tabulate_evidence(evidence_of(compared=True), tmp_path, tmp_path / "evidence.csv")
    table = pd.read_csv(tmp_path / "evidence.csv").set_index(["model", "measure"])
    row = table.loc[("cast", "similarity, with minus without pretraining")]
    assert row["mean"] == row["low"] == row["high"] == 0 and row["seeds"] == 1
    assert table.loc[("cast", "similarity"), "seeds"] == 2


def test_what_an_earlier_configuration_left_is_not_read(folder, tmp_path):
    tabulate_evidence(evidence_of("text_only"), folder, tmp_path / "evidence.csv")
    assert set(pd.read_csv(tmp_path / "evidence.csv")["model"]) == {"text_only"}


def test_every_number_has_crystals_and_an_interval(folder, tmp_path):
    tabulate_evidence(evidence_of(*MODELS), folder, tmp_path / "evidence.csv")
    frame = pd.read_csv(tmp_path / "evidence.csv")
    assert set(frame["model"]) == set(MODELS) and (frame["seeds"] == 2).all()
    few = frame["n"] < 5
    assert few.any() and frame.loc[few, ["mean", "low", "high"]].isna().all(axis=None)
    given = frame[~few]
    assert len(given) > 100 and given[["mean", "low", "high"]].notna().all(axis=None)
    assert (given["low"] <= given["mean"] + 1e-6).all() and (given["mean"] <= given["high"] + 1e-6).all()
    assert set(frame.loc[frame["measure"] == "change", "unit"]) == {"eV"}


def test_numbers_are_what_they_say(tmp_path):
    def row(condition, value, material="a", part=None, share=0.0, draw=0):
        return {"seed": 0, "material_id": material, "condition": condition, "part": part, "share": share,
                "draw": draw, "value": value, "truth": 1.0}  # fmt: skip

    rows = []
    for material, own in zip("abcde", (2.0, 4.0, 3.0, 5.0, 6.0), strict=True):
        rows += [row("own", own, material), row("none", own + 1, material)]
        rows += [row("sentences shuffled", own + d, material, draw=d) for d in (0, 1, 2)]
        rows += [row("without", own - 0.5, material, "formula", 0.2)]
        rows += [row("random", own + d, material, "formula", 0.2, d) for d in (0, 1, -1)]
        for name, mass in (("attention", 0.7), ("attribution", 0.4)):
            rows += [
                row(name, mass, material, "formula", 0.25),
                row(name, 0.1, material, "[CLS], [SEP]", 0.1),
            ]
        for order, change in (("attended", 2.0), ("attributed", 1.0), ("random", 1.0)):
            rows += [row(f"delete {order}", own + change, material, None, s) for s in (0.5, 1.0)]
        rows += [row("rank correlation", 0.3, material)]
    (tmp_path / "probes").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "probes" / "cast.parquet")
    tabulate_evidence(evidence_of("cast"), tmp_path, tmp_path / "evidence.csv")
    found = pd.read_csv(tmp_path / "evidence.csv").set_index(["measure", "about"])["mean"].to_dict()
    assert found["change", "none"] == 1 and found["error change", "none"] == 1
    assert found["change", "sentences shuffled"] == 1
    assert found["change", "formula"] == 0.5 and found["error change", "formula"] == -0.5
    assert found["change by chance", "formula"] == pytest.approx(2 / 3)
    assert found["attention", "formula"] == 0.7 and found["tokens", "formula"] == 0.25
    assert found["attribution", "formula"] == 0.4 and found["inner tokens", "formula"] == 0.25
    # from (0, 0) to (0.5, 2) to (1, 2), and half of that
    assert found["area", "attended"] == 1.5 and found["area", "random"] == 0.75
    assert found["area", "attended minus random"] == 0.75


def test_seeds_are_averaged_within_a_crystal(tmp_path):
    """The bootstrap is over crystals: a second seed that says the same makes no interval narrower."""
    rng = np.random.default_rng(0)
    values = rng.random((3, 8))  # of seeds and crystals
    (tmp_path / "probes").mkdir()
    for name, chosen in (("one", values.mean(axis=0, keepdims=True)), ("three", values)):
        rows = [
            (seed, f"m-{i}", condition, None, None, 0, value * (condition == "own"), 2.0)
            for seed, of_seed in enumerate(chosen)
            for i, value in enumerate(of_seed)
            for condition in ("own", "none")
        ]
        pd.DataFrame(rows, columns=SCHEMA.names).to_parquet(tmp_path / "probes" / "masked_node.parquet")
        tabulate_evidence(evidence_of("masked_node"), tmp_path, tmp_path / f"{name}.csv")
    one, three = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("one", "three"))
    assert list(one["seeds"]) == [1, 1] and list(three["seeds"]) == [3, 3]
    pd.testing.assert_frame_equal(one.drop(columns="seeds"), three.drop(columns="seeds"), rtol=1e-4)
    assert list(three["n"]) == [8, 8] and three["mean"][0] == pytest.approx(values.mean() / 2, rel=1e-4)


def test_cls_attention_of_the_encoder(study, encoder, tmp_path):
    from transformers import AutoModel

    output = tmp_path / "text.json"
    extract_text_attention(study / "descriptions.parquet", study / "tokens", encoder, output, "m-2")
    found = json.loads(output.read_text())
    weights = np.array(found["weights"])
    assert weights.shape == (2, 2, len(found["words"])) and weights.sum(-1) == pytest.approx(1, abs=1e-4)
    assert found["formula"] == "MgO" and found["tokens"] < found["tokens_full"]
    reading = Reader.of(study / "tokens", encoder).read(TEXTS[0])
    model = AutoModel.from_pretrained(encoder, attn_implementation="eager")
    with torch.no_grad():
        maps = model(torch.from_numpy(reading.ids)[None], output_attentions=True).attentions
    expected = np.stack([reading.by_word(m[0, :, 0].numpy()) for m in maps])
    assert weights == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("material", ["m-0", "mp-1"])
def test_a_crystal_without_description_is_left_out_with_a_note(study, encoder, tmp_path, material, caplog):
    output = tmp_path / "text.json"
    extract_text_attention(study / "descriptions.parquet", study / "tokens", encoder, output, material)
    note = json.loads(output.read_text())["note"]
    assert note.startswith(f"attention.text: {material} has no description in this data set")
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [note]


def test_what_is_taken_out_is_what_the_condition_says(study, encoder, monkeypatch):
    """By the texts that the model is asked about."""
    subject, texts = subject_of(study, encoder, "cast"), []
    reading = Reader.of(study / "tokens", encoder).read(TEXTS[0])
    weights = {name: np.random.default_rng(seed).random(len(reading.ids)) for seed, name in
               enumerate(("attention", "attribution"))}  # fmt: skip
    for name, found in weights.items():
        monkeypatch.setattr(subject, name, lambda *_, found=found: found)
    monkeypatch.setattr(subject, "values", lambda _, asked: texts.extend(asked) or np.zeros(len(asked)))
    ids, inner, other = reading.ids, reading.inner, np.arange(4)
    rows = list(subject.probe(1, reading, other, np.random.default_rng(0)))[-len(texts) :]
    whole = {"own": ids, "another crystal's": other, "none": ids[:1]}
    orders = {"delete attended": "attention", "delete attributed": "attribution"}
    for row, text in zip(rows, texts, strict=True):
        places = np.flatnonzero(reading.part == LABELS.index(row.part)) if row.part else None
        if row.condition in whole:
            assert np.array_equal(text, whole[row.condition])
        elif row.condition == "without":
            assert np.array_equal(text, np.delete(ids, places)) and row.share == len(places) / len(inner)
        elif row.condition == "random":
            assert len(text) == len(ids) - len(places) and (text[0], text[-1]) == (ids[0], ids[-1])
        elif row.condition == "only formula":
            kept = (reading.part == LABELS.index("formula")) | (reading.part == SPECIAL)
            assert np.array_equal(text, ids[kept])
        elif row.condition in orders:
            first = sorted(inner, key=lambda place: -weights[orders[row.condition]][place])
            assert np.array_equal(text, np.delete(ids, first[: round(row.share * len(inner))]))
        elif row.condition == "delete random":
            assert len(text) == len(ids) - round(row.share * len(inner))
    assert {row.condition for row in rows} == {
        *whole, *orders, "without", "random", "only formula", "delete random", "sentences shuffled",
    }  # fmt: skip


def test_the_text_of_another_crystal_is_another(folder):
    frame = read(folder, "cast").query("seed == 0").set_index("material_id")
    own, other = (frame.loc[frame["condition"] == name, "value"] for name in ("own", "another crystal's"))
    assert (own - other).abs().max() > 1e-6
