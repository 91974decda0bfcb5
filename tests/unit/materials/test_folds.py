"""The folds are Matbench's own, and the splits of a fold keep its test crystals out of everything else."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from castbench.errors import InputError
from castbench.labels import FOLDS, MATBENCH
from castbench.materials.folds import check_published, make_folds, split_matbench
from castbench.materials.matbench import make_ids, published
from castbench.materials.splits import load_split
from castbench.provenance import sha256_file
from matbench_data import values, write_task

REGRESSIONS = [task for task, target in MATBENCH.items() if target.task == "regression"]
JDFT, METAL = "matbench_jdft2d", "matbench_mp_is_metal"


@pytest.mark.parametrize("task", REGRESSIONS)
def test_folds_of_the_published_sizes_are_the_published_ones(tmp_path, task):
    """By the checksums of the matbench package's validation file, which does not depend on the values."""
    n = published(task).n
    fold = make_folds(np.zeros(n), False, tmp_path)
    check_published(task, np.array(list(make_ids(task, n))), fold)


def test_other_folds_are_refused(tmp_path):
    fold = make_folds(np.zeros(636), False, tmp_path)
    with pytest.raises(InputError, match="matbench_jdft2d: its folds are not those that Matbench published"):
        check_published(JDFT, np.array(list(make_ids(JDFT, 636))), (fold + 1) % FOLDS)


def test_every_fold_has_its_share_of_each_class(tmp_path):
    classes = np.array(values(METAL, 100), dtype=float)
    fold = make_folds(classes, True, tmp_path)
    assert [int(classes[fold == k].sum()) for k in range(FOLDS)] == [8] * FOLDS
    assert [int((fold == k).sum()) for k in range(FOLDS)] == [20] * FOLDS


def split(folder, validation, seed=0, without=(), n=40):
    path = write_task(folder, JDFT, n)
    ids = list(make_ids(JDFT, n))
    pq.write_table(pa.table({"material_id": [x for x in ids if x not in without]}), folder / "m.parquet")
    settings = {"files": {JDFT: str(path)}, "validation": validation, "seed": seed}
    split_matbench(settings, folder / "m.parquet", folder / "splits", folder / "tasks")
    folds = [load_split(folder / "splits" / f"{JDFT}.fold_{k}.json") for k in range(FOLDS)]
    return ids, folds, pq.read_table(folder / "tasks" / f"{JDFT}.parquet").to_pydict()


def test_folds_share_out_all_crystals_and_train_on_the_rest(tmp_path):
    ids, folds, table = split(tmp_path, 0)
    assert sorted(x for fold in folds for x in fold["test"]) == ids == table["material_id"]
    assert table["value"] == values(JDFT, 40)
    for k, fold in enumerate(folds):
        assert fold["test"] == [x for x, f in zip(ids, table["fold"], strict=True) if f == k]
        assert sorted(fold["train"] + fold["test"]) == ids
        assert fold["validation"] == [] and fold["reason"] is None


def test_validation_is_drawn_from_the_training_fold_by_seed(tmp_path):
    _, whole, _ = split(tmp_path, 0)
    _, folds, _ = split(tmp_path, 0.25)
    _, others, _ = split(tmp_path, 0.25, seed=1)
    for everything, fold, other in zip(whole, folds, others, strict=True):
        assert fold["test"] == everything["test"] == other["test"]
        assert sorted(fold["train"] + fold["validation"]) == everything["train"]
        assert len(fold["validation"]) == 8
        assert fold["validation"] != other["validation"]
    assert folds[0]["validation"] != folds[1]["validation"]


def test_a_record_without_a_structure_changes_no_fold(tmp_path, caplog):
    ids, whole, table = split(tmp_path, 0)
    _, folds, other = split(tmp_path, 0, without=ids[7:9])
    assert other == table
    for everything, fold in zip(whole, folds, strict=True):
        assert fold["test"] == [x for x in everything["test"] if x not in ids[7:9]]
        assert fold["train"] == [x for x in everything["train"] if x not in ids[7:9]]
    assert "2 records have no usable structure" in caplog.text


def test_fewer_records_than_folds_are_refused(tmp_path):
    with pytest.raises(InputError, match="4 records do not make 5 folds"):
        split(tmp_path, 0, n=4)


def test_a_task_without_usable_crystals_is_a_gap(tmp_path):
    _, folds, _ = split(tmp_path, 0, without=list(make_ids(JDFT, 40)))
    assert {fold["status"] for fold in folds} == {"too_few"}
    assert "no crystal is left in train" in json.dumps(folds[0])


def test_folds_of_the_published_file_are_compared_with_the_published(tmp_path, monkeypatch):
    """Here of a smaller file, which is taken for it."""

    def of_this_file(task):
        return replace(published(task), sha256=sha256_file(tmp_path / f"{task}.json.gz"))

    monkeypatch.setattr("castbench.materials.folds.published", of_this_file)
    with pytest.raises(InputError, match="matbench_jdft2d: its folds are not those that Matbench published"):
        split(tmp_path, 0)


def test_folds_of_a_classification_have_its_classes(tmp_path):
    path = write_task(tmp_path, METAL, 50)
    pq.write_table(pa.table({"material_id": list(make_ids(METAL, 50))}), tmp_path / "m.parquet")
    settings = {"files": {METAL: str(path)}, "validation": 0, "seed": 0}
    split_matbench(settings, tmp_path / "m.parquet", tmp_path / "splits", tmp_path / "tasks")
    table = pq.read_table(tmp_path / "tasks" / f"{METAL}.parquet")
    metals = table["fold"].to_numpy()[table["value"].to_numpy() == 1]
    assert np.bincount(metals).tolist() == [4] * FOLDS
