"""Predictions for crystals in files: the run's own bits, other formats, seeds, and what cannot be read."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure

from castbench.cli import main
from castbench.errors import InputError
from castbench.evaluation.new_crystals import find_encoder, is_crystal, make_caches
from castbench.evaluation.predict import finished_runs, predict
from castbench.materials.readers import read_records
from castbench.materials.records import SCHEMA, Columns, to_table
from castbench.materials.splits import write_split
from castbench.provenance import package_versions, write_json
from castbench.text.encoders import prefetch_encoder
from castbench.text.states import embed_text
from castbench.training.compositions import train_compositions
from castbench.training.train import train_model
from composition_data import aggregated, composition_settings, rows, split
from small_study import ARCHITECTURE, write_encoder

MODELS = {"structure_only": [0, 1, 2], "cast_scratch": [0], "text_only": [0]}
TRAINING: dict[str, Any] = {
    "epochs": 2, "batch_size": 5, "learning_rate": 1e-2, "lora_learning_rate": 1e-2, "weight_decay": 0.0,
    "loss": "l1", "warmup_steps": 0, "cycles": 1, "precision": "32-true", "device": "cpu", "threads": 1,
}  # fmt: skip
FORMATS = ("POSCAR", "a.vasp", "b.cif", "c.json", "d.xsf", "e.jsonl", "f.cif.gz")
UNIT = "total_energy (eV/atom)"


@pytest.fixture(scope="module")
def study(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results/{dataset} of 36 bundled crystals, from graphs and texts to trained runs."""
    results = tmp_path_factory.mktemp("predict") / "results" / "small"
    results.mkdir(parents=True)
    records = list(read_records(root / "workflow/resources/demo/crystals.jsonl.zst"))[::4][:36]
    kept = [Columns({}).read(record, name, "demo") for name, record in records]
    ids, materials = [material.material_id for material in kept], results / "materials.parquet"
    pq.write_table(to_table(kept), materials)
    split = results / "splits" / "total_energy.json"
    lists = {"train": ids[:20], "validation": ids[20:25], "test": ids[:24:-1]}  # 11 in another order
    write_split(split, {"target": "total_energy"}, lists)
    write_encoder(results / "bert")
    prefetch_encoder(str(results / "bert"), results.parent / "encoders" / "tiny")
    encoder = results.parent / "encoders" / "tiny"
    # The stages read their settings from here, where there is nothing yet.
    graphs = {"structure_encoder": "cogn", "neighbours": 24, "symprec": 1e-4}
    write_json(results / "graphs" / "manifest.json", {"settings": graphs})
    write_json(results / "tokens" / "manifest.json", {"format": 1, "files": {}, "max_tokens": 150})
    make_caches(materials, results, results, encoder)
    for model, seeds in MODELS.items():
        remaining = int(model == "text_only")
        states = results / "text_states" / str(remaining)
        if not states.exists():
            embed_text(results / "tokens", encoder, remaining, states)
        settings = {"dataset": "small", "model": model, "architecture": ARCHITECTURE, "training": TRAINING}
        train_model(
            settings, model, "total_energy", seeds, materials, split, results / "graphs", results / "tokens",
            states, encoder, [], results / "runs" / "total_energy" / model, 1,
        )  # fmt: skip
    return results


def run_of(study: Path, model: str) -> Path:
    return study / "runs" / "total_energy" / model


def truth(study: Path, model: str, seed: int = 0) -> pd.DataFrame:
    """The run's own test predictions."""
    table = pd.read_parquet(run_of(study, model) / str(seed) / "predictions.parquet")
    return table[table["split"] == "test"].reset_index(drop=True)


def test_rows(study: Path, output: Path, ids: list[str]) -> Path:
    """A table of materials in this order."""
    table = pq.read_table(study / "materials.parquet")
    places = {identifier: row for row, identifier in enumerate(table["material_id"].to_pylist())}
    pq.write_table(table.take([places[identifier] for identifier in ids]), output)
    return output


test_rows.__test__ = False  # type: ignore[attr-defined]


def structures(study: Path, ids: list[str]) -> dict[str, Structure]:
    table = pd.read_parquet(study / "materials.parquet").set_index("material_id")["structure"]
    return {
        identifier: Structure(
            Lattice(np.reshape(table[identifier]["lattice"], (3, 3))),
            list(table[identifier]["species"]),
            np.reshape(table[identifier]["frac_coords"], (-1, 3)),
        )
        for identifier in ids
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_runs_own_test_crystals_get_its_own_bits(study, tmp_path, model):
    own = truth(study, model)
    rows = test_rows(study, tmp_path / "test.parquet", own["material_id"].tolist())
    output = tmp_path / "found.csv"
    assert main(["predict", str(run_of(study, model) / "0"), str(rows), "--output", str(output)]) == 0
    found = pd.read_csv(output, float_precision="round_trip")
    assert found["id"].tolist() == own["material_id"].tolist()
    np.testing.assert_array_equal(found[UNIT], own["y_pred"])
    np.testing.assert_array_equal(found["total_energy seed 0 (eV/atom)"], own["y_pred"])
    assert found["total_energy std over seeds (eV/atom)"].isna().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.csv", "test.parquet"]


@pytest.mark.parametrize("model", ["structure_only", "cast_scratch"])
def test_other_company_and_cif_files_change_the_last_digits_alone(study, tmp_path, model):
    own = truth(study, model).set_index("material_id")["y_pred"]
    for identifier, structure in structures(study, own.index[:4].tolist()).items():
        structure.to_file(str(tmp_path / f"{identifier}.cif"))
    predict(run_of(study, model) / "0", [tmp_path], output=tmp_path / "found.parquet")
    found = pd.read_parquet(tmp_path / "found.parquet").set_index("id")
    assert len(found) == 4
    np.testing.assert_allclose(found[UNIT], own[found.index], rtol=2e-4)
    assert found["source"].iloc[0] == str(tmp_path / f"{found.index[0]}.cif")


def test_a_models_folder_predicts_with_all_seeds(study, tmp_path, caplog):
    ids = truth(study, "structure_only")["material_id"].tolist()
    rows = test_rows(study, tmp_path / "test.parquet", ids)
    model = shutil.copytree(run_of(study, "structure_only"), tmp_path / "r/runs/total_energy/structure_only")
    shutil.copytree(study / "graphs", tmp_path / "r/graphs")
    with caplog.at_level("INFO"):
        predict(model, [rows], output=tmp_path / "found.parquet")
    found = pd.read_parquet(tmp_path / "found.parquet")
    own = np.stack([truth(study, "structure_only", seed)["y_pred"] for seed in (0, 1, 2)])
    np.testing.assert_array_equal(found[[f"total_energy seed {seed} (eV/atom)" for seed in (0, 1, 2)]].T, own)
    np.testing.assert_array_equal(found[UNIT], own.mean(axis=0))
    np.testing.assert_array_equal(found["total_energy std over seeds (eV/atom)"], own.std(axis=0, ddof=1))
    assert "total_energy std over seeds (eV/atom)" in caplog.text
    record = json.loads((model / "1" / "metrics.json").read_text())
    write_json(model / "1" / "metrics.json", record | {"status": "failed", "reason": "loss is not finite"})
    predict(model, [rows], output=tmp_path / "found.parquet")
    found = pd.read_parquet(tmp_path / "found.parquet")
    assert "total_energy seed 1 (eV/atom)" not in found
    np.testing.assert_array_equal(found[UNIT], own[[0, 2]].mean(axis=0))
    assert "1: failed, loss is not finite; left out" in caplog.text


def test_every_format_of_a_crystal_predicts_the_same(study, tmp_path):
    identifier = truth(study, "structure_only")["material_id"][0]
    structure = structures(study, [identifier])[identifier].get_sorted_structure()
    files = [tmp_path / name for name in FORMATS]
    for file in files[:3] + files[4:5]:
        structure.to_file(str(file), fmt="poscar" if file.name in ("POSCAR", "a.vasp") else "")
    files[3].write_text(json.dumps(structure.as_dict(), indent=1))
    files[5].write_text(json.dumps({"id": "e", "structure": structure.as_dict()}) + "\n")
    structure.to_file(str(files[6]), fmt="cif")
    predict(run_of(study, "structure_only") / "0", files, output=tmp_path / "out" / "found.parquet")
    found = pd.read_parquet(tmp_path / "out" / "found.parquet")
    assert found["id"].tolist() == ["POSCAR", "a", "b", "c", "d", "e", "f"]
    np.testing.assert_allclose(found[UNIT], found[UNIT][3], rtol=1e-4)


def test_a_folder_is_read_in_any_case_and_what_is_passed_over_is_said(study, tmp_path, caplog):
    ids = truth(study, "structure_only")["material_id"][:3].tolist()
    folder, run = tmp_path / "crystals", run_of(study, "structure_only") / "0"
    folder.mkdir()
    texts = [structure.to(fmt="cif") for structure in structures(study, ids).values()]
    (folder / "A.CIF").write_text(texts[0])
    (folder / "b.cif.gz").write_bytes(gzip.compress(texts[1].encode()))
    (folder / "c.cif").write_text("\n".join(["data_global\n_journal_year 2020", *texts]))
    for name in ("notes.txt", "table.csv"):
        (folder / name).write_text("x\n")
    predict(run, [folder], output=tmp_path / "found.parquet")
    found = pd.read_parquet(tmp_path / "found.parquet").set_index("id")[UNIT]
    assert found.index.tolist() == ["A", "b", "c-1", "c-2", "c-3"]
    np.testing.assert_allclose(found[["A", "b"]], found[["c-1", "c-2"]], rtol=1e-6)
    assert f"{folder}: 2 files passed over, no crystals by their names: notes.txt, table.csv" in caplog.text
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(InputError, match="crystals: there is no crystal"):
        predict(run, [folder], output=tmp_path / "found.parquet")


def test_a_table_is_read_with_the_columns_of_the_runs_data_set(study, tmp_path):
    ids = truth(study, "structure_only")["material_id"][:2].tolist()
    table = [{"name": i, "my_cif": s.to(fmt="cif")} for i, s in structures(study, ids).items()]
    own = shutil.copytree(run_of(study, "structure_only"), tmp_path / "r/runs/total_energy/structure_only")
    shutil.copytree(study / "graphs", tmp_path / "r/graphs")
    write_json(tmp_path / "r/materials/manifest.json", {"columns": {"material_id": "name", "cif": "my_cif"}})
    pd.DataFrame(table).to_csv(tmp_path / "theirs.csv", index=False)
    pd.DataFrame(table).rename(columns={"name": "id", "my_cif": "cif"}).to_csv(
        tmp_path / "ours.csv", index=False
    )
    found = []
    for name in ("theirs.csv", "ours.csv"):
        predict(own, [tmp_path / name], output=tmp_path / "found.parquet")
        found.append(pd.read_parquet(tmp_path / "found.parquet").drop(columns="source"))
    assert found[0]["id"].tolist() == ids
    pd.testing.assert_frame_equal(*found)


@pytest.mark.parametrize("cache", ["graphs", "tokens"])
def test_caches_that_have_changed_since_the_run_are_refused(study, tmp_path, cache):
    ids = truth(study, "cast_scratch")["material_id"].tolist()
    rows = test_rows(study, tmp_path / "test.parquet", ids)
    run = shutil.copytree(run_of(study, "cast_scratch"), tmp_path / "r/runs/total_energy/cast_scratch")
    for name in ("graphs", "tokens"):
        shutil.copytree(study / name, tmp_path / "r" / name)
    manifest = tmp_path / "r" / cache / "manifest.json"
    content = json.loads(manifest.read_text())
    content |= (
        {"max_tokens": 20} if cache == "tokens" else {"settings": content["settings"] | {"neighbours": 6}}
    )
    write_json(manifest, content)
    with pytest.raises(InputError, match=f"r/{cache}: not what .*cast_scratch/0 was trained on"):
        predict(run, [rows], output=tmp_path / "found.parquet")


def test_what_cannot_be_read_costs_a_line_and_the_rest_goes_on(study, tmp_path, capsys):
    identifier = truth(study, "structure_only")["material_id"][0]
    good = structures(study, [identifier])[identifier]
    good.to_file(str(tmp_path / "good.cif"))
    (tmp_path / "broken.cif").write_text("data_x\nnothing\n")
    (tmp_path / "notes.txt").write_text("no crystal\n")
    disordered = Structure(Lattice.cubic(4), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    disordered.to_file(str(tmp_path / "alloy.cif"))
    names = ["good.cif", "broken.cif", "notes.txt", "alloy.cif", "absent.cif"]
    output = tmp_path / "found.csv"
    run = run_of(study, "structure_only") / "0"
    assert main(["predict", str(run), *(str(tmp_path / n) for n in names), "--output", str(output)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 5
    for name, line in zip(names[1:], errors, strict=False):
        assert name in line and line.endswith("; no prediction")
    assert "4 of 5 have no prediction" in errors[-1] and "has the others" in errors[-1]
    assert pd.read_csv(output)["id"].tolist() == ["good"]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ("runs/total_energy/cast", "no finished run is here; give results/DATASET/runs/TARGET/MODEL"),
        ("pretraining", "is a pretraining, which predicts no property"),
        ("forest", "random_forest keeps no weights"),
    ],
)
def test_what_predicts_no_crystals_is_said_in_one_line(study, tmp_path, capsys, run, reason):
    write_json(tmp_path / "pretraining" / "0" / "metrics.json", {"status": "finished", "objective": "x"})
    write_json(tmp_path / "forest" / "0" / "metrics.json", {"status": "finished", "model": "random_forest"})
    write_json(tmp_path / "forest" / "0" / "config.json", {})
    folder = study / run if run.startswith("runs") else tmp_path / run
    assert main(["predict", str(folder), str(study / "materials.parquet")]) == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]


def test_seeds_of_other_settings_are_not_averaged_with_the_others(study, tmp_path, capsys):
    runs, crystals = tmp_path / "structure_only", str(study / "materials.parquet")
    shutil.copytree(run_of(study, "structure_only"), runs)
    (runs / "0.old").mkdir()
    config = json.loads((runs / "2" / "config.json").read_text())
    config["training"]["epochs"] = 1
    write_json(runs / "2" / "config.json", config)
    assert main(["predict", str(runs), crystals]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{runs / '2'}: has other settings or data than {runs / '0'}; remove" in error


def test_a_run_that_is_not_beside_its_graphs_is_refused(study, tmp_path, capsys):
    runs = tmp_path / "structure_only"
    shutil.copytree(run_of(study, "structure_only"), runs)
    for run in (runs, runs / "0"):
        assert main(["predict", str(run), str(study / "materials.parquet")]) == 2
        assert "is not where it was trained, results/DATASET" in capsys.readouterr().err


def test_other_packages_than_in_training_are_named(study, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        "castbench.evaluation.predict.package_versions", lambda: package_versions() | {"pymatgen-core": "0"}
    )
    finished_runs(run_of(study, "structure_only"))
    here = package_versions()["pymatgen-core"]
    assert f"trained with pymatgen-core {here}, here 0; predictions may differ" in caplog.text


def test_nothing_to_predict_is_an_error(study, tmp_path, capsys):
    assert main(["predict", str(run_of(study, "structure_only")), str(tmp_path / "absent.cif")]) == 2
    assert "none of the 1 crystals can be read" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_formulas_get_the_runs_own_bits_and_bad_ones_a_line(tmp_path, capsys, precision):
    data = aggregated(tmp_path, rows())
    split(data)
    runs = tmp_path / "edm_transformer"
    settings = composition_settings(epochs=2)
    settings["training"] = settings["training"] | {"precision": precision}
    train_compositions(
        settings, "edm_transformer", [0, 1], data / "compositions.parquet",
        data / "split.json", runs, 1,
    )  # fmt: skip
    own = [pd.read_parquet(runs / seed / "predictions.parquet").query("split == 'test'") for seed in "01"]
    own[0][["formula"]].to_csv(tmp_path / "test.csv", index=False)
    predict(runs, [tmp_path / "test.csv"], output=tmp_path / "found.parquet")
    found = pd.read_parquet(tmp_path / "found.parquet")
    for seed in (0, 1):
        np.testing.assert_array_equal(found[f"band_gap seed {seed} (eV)"], own[seed]["band_gap_pred"])
        np.testing.assert_array_equal(found[f"P(stable) seed {seed}"], own[seed]["stability_pred"])
    np.testing.assert_array_equal(
        found["band_gap (eV)"], np.mean([frame["band_gap_pred"] for frame in own], axis=0)
    )
    output = tmp_path / "two.csv"
    assert main(["predict", str(runs / "0"), "CaTiO3", "CaXyO3", "CsSnI3", "--output", str(output)]) == 2
    assert pd.read_csv(output)["formula"].tolist() == ["CaTiO3", "CsSnI3"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 2 and "CaXyO3: element without embedding" in errors[0]
    assert "1 of 3 have no prediction" in errors[1]


@pytest.mark.parametrize(
    ("name", "looked_at"),
    [
        ("a.cif", True), ("a.mcif", True), ("POSCAR", True), ("POSCAR_relaxed", True), ("CONTCAR", True),
        ("a.vasp", True), ("a.xsf", True), ("a.res", True), ("vasprun.xml", True), ("vasprun_2.xml.gz", True),
        ("a.json", True), ("A.CIF.zst", True), ("OUTCAR", False), ("a.xml", False), ("a.csv", False),
    ],
)  # fmt: skip
def test_files_of_a_folder_that_are_looked_at(name, looked_at):
    assert is_crystal(Path(name)) == looked_at


def test_seeds_of_other_data_are_not_averaged_with_the_others(study, tmp_path):
    runs = shutil.copytree(run_of(study, "structure_only"), tmp_path / "structure_only")
    record = json.loads((runs / "2" / "metrics.json").read_text())
    write_json(runs / "2" / "metrics.json", record | {"inputs": record["inputs"] | {"split": "another"}})
    with pytest.raises(InputError, match="2: has other settings or data than"):
        finished_runs(runs)


def test_the_encoder_is_found_by_its_checksum(tmp_path):
    for name in ("a", "b"):
        write_json(tmp_path / name / "manifest.json", {"checksum": f"of {name}"})
    assert find_encoder(tmp_path, "of b") == tmp_path / "b"
    with pytest.raises(InputError, match="does not hold the text encoder of this run"):
        find_encoder(tmp_path, "of c")


@pytest.mark.parametrize("status", ["provided", "ok"])
def test_a_text_that_comes_with_a_crystal_is_read_where_those_of_the_data_set_did(study, tmp_path, status):
    results, new = tmp_path / "r", tmp_path / "new"
    for name in ("graphs", "tokens"):
        shutil.copytree(study / name, results / name)
    write_json(results / "descriptions.json", {"by_status": {status: 36}})
    table = pq.read_table(study / "materials.parquet").slice(0, 1).to_pylist()
    new.mkdir()
    pq.write_table(pa.Table.from_pylist([table[0] | {"text": "Own words."}], SCHEMA), new / "m.parquet")
    make_caches(new / "m.parquet", new, results, study.parent / "encoders" / "tiny")
    text = pq.read_table(new / "descriptions.parquet")["text"][0].as_py()
    assert (text == "Own words.") == (status == "provided") and text
