import json
import random
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castbench.errors import InputError
from castbench.labels import TARGET_ORDER
from castbench.materials.splits import PARTS, assign, load_split, split_materials

FRACTIONS = [0.8, 0.1, 0.1]


def table(rows):
    """A table of (id, formula, targets)."""
    ids, formulas, targets = zip(*rows, strict=True)
    columns = [pa.array(ids), pa.array(formulas), pa.array(targets, pa.list_(pa.string()))]
    return pa.table(columns, names=["material_id", "formula", "targets"])


def make_rows(count, seed=0):
    """Crystals of which all have an energy, half a gap and a fifth moduli, three polymorphs a formula."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        share = draw.random()
        targets = ["formation_energy"]
        targets += ["band_gap"] if share < 0.5 else []
        targets += ["log_shear_modulus", "log_bulk_modulus"] if share < 0.2 else []
        rows.append((f"mp-{i}", f"F{i // 3}", targets))
    return rows


@pytest.fixture
def split(tmp_path):
    def run(rows, seed=0, group_by=None, fractions=FRACTIONS, targets=TARGET_ORDER):
        path = tmp_path / "materials.parquet"
        pq.write_table(rows if isinstance(rows, pa.Table) else table(rows), path, row_group_size=100)
        keys = {"targets": list(targets), "seed": seed, "fractions": fractions, "group_by": group_by}
        split_materials(keys, materials=path, output=tmp_path / "splits")
        return {target: load_split(tmp_path / "splits" / f"{target}.json") for target in targets}

    return run


def test_lists_are_disjoint_complete_and_in_proportion(split):
    rows = make_rows(400)
    splits = split(rows)
    for target, content in splits.items():
        expected = sorted(name for name, _, targets in rows if target in targets)
        assert sorted(name for part in PARTS for name in content[part]) == expected
        if expected:
            assert content["status"] == "ok"
            for part, fraction in zip(PARTS, FRACTIONS, strict=True):
                assert abs(len(content[part]) - fraction * len(expected)) < 1
    assert splits["total_energy"]["status"] == "too_few"


def test_a_material_is_on_one_side_for_every_target(split):
    sides = defaultdict(set)
    for content in split(make_rows(400)).values():
        for part in PARTS:
            for name in content[part]:
                sides[name].add(part)
    assert len(sides) == 400
    assert all(len(parts) == 1 for parts in sides.values())


def test_order_of_rows_does_not_matter_and_the_seed_does(split):
    rows = make_rows(200)
    first = split(rows, seed=1)
    assert split(rows, seed=1) == first
    random.Random(5).shuffle(rows)
    again = split(rows, seed=1)
    for target, content in again.items():
        assert content.pop("materials_sha256") != first[target].pop(
            "materials_sha256"
        )  # training starts anew
    assert again == first
    assert split(rows, seed=2)["formation_energy"]["test"] != first["formation_energy"]["test"]


def test_polymorphs_stay_together(split):
    rows = make_rows(600)
    formula = {name: formula for name, formula, _ in rows}
    sides = defaultdict(set)
    for content in split(rows, group_by="formula").values():
        for part in PARTS:
            for name in content[part]:
                sides[formula[name]].add(part)
    assert all(len(parts) == 1 for parts in sides.values())
    assert set().union(*sides.values()) == set(PARTS)


def test_prototypes_stay_together(split, salt, write_materials):
    cells = {"CsCl": [0.5, 0.5, 0.5], "polar": [0.5, 0.5, 0.4], "monoclinic": [0.45, 0.5, 0.4]}
    records = [
        salt | {"material_id": f"{name}-{i}", "species": ["Cs", halide], "frac_coords": [[0, 0, 0], position]}
        for name, position in cells.items()
        for i, halide in enumerate(["F", "Cl", "Br", "I"] * 3)
    ]
    materials = pq.read_table(write_materials(records))
    targets = pa.array([["band_gap"]] * len(records), pa.list_(pa.string()))
    labelled = materials.append_column("targets", targets)
    content = split(labelled, group_by="prototype", fractions=[1 / 3] * 3, targets=["band_gap"])["band_gap"]
    assert content["status"] == "ok"
    families = [{name.split("-")[0] for name in content[part]} for part in PARTS]
    assert [len(family) for family in families] == [1, 1, 1]


@pytest.mark.parametrize("count", [19, 20])
def test_fewer_than_twenty_crystals_are_too_few(split, caplog, count):
    content = split([(f"m-{i}", "F", ["band_gap"]) for i in range(count)], targets=["band_gap"])["band_gap"]
    assert content["status"] == ("too_few" if count < 20 else "ok")
    assert [len(content[part]) for part in PARTS] == ([0, 0, 0] if count < 20 else [16, 2, 2])
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == ([f"band_gap: {content['reason']}; skipped"] if count < 20 else [])


def test_too_few_groups_leave_no_test_crystals(split, caplog):
    content = split(
        [(f"m-{i}", "F", ["band_gap"]) for i in range(50)], group_by="formula", targets=["band_gap"]
    )
    assert content["band_gap"]["status"] == "too_few"
    assert "too few groups by formula" in caplog.text


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=80
    ),
    seed=st.integers(0, 9),
    fractions=st.sampled_from([[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [1 / 3, 1 / 3, 1 / 3]]),
)
def test_rarest_target_is_shared_out_within_one_group(sizes, seed, fractions):
    counts = np.array(sizes)
    parts = np.array(assign(counts, fractions, seed))
    assert ((parts >= 0) == (counts.sum(axis=1) > 0)).all()
    rarest = counts[:, np.argsort(counts.sum(axis=0), kind="stable")[0]]
    for part, fraction in enumerate(fractions):
        assert abs(rarest[parts == part].sum() - fraction * rarest.sum()) <= rarest.max() + 1e-9


@settings(max_examples=100, deadline=None)
@given(nested=st.lists(st.integers(1, 4), min_size=1, max_size=200), seed=st.integers(0, 9))
def test_nested_targets_are_shared_out_within_two_crystals(nested, seed):
    counts = np.array([[1] * depth + [0] * (4 - depth) for depth in nested])
    parts = np.array(assign(counts, FRACTIONS, seed))
    for target in range(4):
        total = counts[:, target].sum()
        for part, fraction in enumerate(FRACTIONS):
            assert abs(counts[parts == part, target].sum() - fraction * total) < 2


def change_id(content):
    content["test"][0] = "another"


def move_id(content):
    content["train"].append(content["test"].pop())


@pytest.mark.parametrize("damage", [change_id, move_id, lambda content: content.pop("checksum")])
def test_damaged_split_is_refused(split, tmp_path, damage):
    content = split(make_rows(60))["formation_energy"]
    damage(content)
    path = tmp_path / "splits" / "formation_energy.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="run split_materials again"):
        load_split(path)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_file_that_is_no_split_is_refused(tmp_path, text):
    (tmp_path / "band_gap.json").write_text(text)
    with pytest.raises(InputError, match="is not a split"):
        load_split(tmp_path / "band_gap.json")
    with pytest.raises(InputError, match="is not a split"):
        load_split(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("fractions", "group_by", "message"),
    [([0.8, 0.1], None, "fractions"), ([0.8, 0.2, 0.2], None, "sum to 1"), ([1, 0, 0], None, "positive"),
     (FRACTIONS, "colour", "group_by: 'colour'")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(split, fractions, group_by, message):
    with pytest.raises(InputError, match=message):
        split(make_rows(30), fractions=fractions, group_by=group_by)
