import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from castbench.errors import InputError
from castbench.labels import TARGET_ORDER
from castbench.materials.filters import MODULI, filter_materials

OFF = {
    "max_formation_energy": None,
    "max_energy_above_hull": None,
    "min_formation_energy": None,
    "positive_moduli": False,
    "ordered_moduli": False,
    "max_modulus": None,
    "exclude_noble_gases": False,
    "exclude_metals": False,
    "abx3": False,
}
PAPER = {
    "max_formation_energy": 0.15,
    "max_energy_above_hull": 0.15,
    "min_formation_energy": -10.0,
    "positive_moduli": True,
    "ordered_moduli": True,
    "max_modulus": 1000.0,
    "exclude_noble_gases": True,
    "exclude_metals": True,
}
MODULUS_TARGETS = ["log_shear_modulus", "log_bulk_modulus"]


@pytest.fixture
def run(tmp_path, write_materials):
    """Filter records, or a collected table; gives the kept rows and the funnel."""

    def filter_(materials, filters, targets=TARGET_ORDER, group=1000, **more):
        if isinstance(materials, list):
            manifest = tmp_path / "manifest.json"
            materials = write_materials(materials, group)
            manifest.write_text(json.dumps({"by_reason": {"missing structure": 3}}))
        else:
            manifest = materials.with_name("manifest.json")
        output, funnel = tmp_path / "materials.parquet", tmp_path / "funnel.json"
        settings = {"filters": filters, "targets": list(targets), **more}
        filter_materials(settings, materials=materials, manifest=manifest, output=output, funnel=funnel)
        return pq.read_table(output).to_pylist(), json.loads(funnel.read_text())

    return filter_


def variants(salt, *changes):
    """The salt, and copies of it with something changed."""
    return [salt, *(salt | {"material_id": f"m-{i}"} | change for i, change in enumerate(changes))]


@pytest.mark.parametrize(
    ("key", "removed", "kept", "targets"),
    [
        (
            "max_formation_energy",
            {"formation_energy_per_atom": 0.151},
            {"formation_energy_per_atom": 0.15},
            "all",
        ),
        ("max_energy_above_hull", {"energy_above_hull": 0.2}, {"energy_above_hull": 0.15}, "all"),
        (
            "min_formation_energy",
            {"formation_energy_per_atom": -10.5},
            {"formation_energy_per_atom": -9.9},
            "all",
        ),
        ("exclude_noble_gases", {"species": ["Cs", "Xe"]}, {"species": ["Cs", "I"]}, "all"),
        ("exclude_metals", {"band_gap": 0.0}, {"band_gap": 0.01}, ["band_gap"]),
        ("positive_moduli", {"g_reuss": 0.0}, {"g_reuss": None}, MODULUS_TARGETS),
        ("positive_moduli", {"k_vrh": -3.0}, {"k_vrh": 17.0}, MODULUS_TARGETS),
        ("ordered_moduli", {"g_reuss": 9.1}, {"g_reuss": 8.0}, MODULUS_TARGETS),
        ("ordered_moduli", {"k_vrh": 17.1}, {"k_voigt": 18.0, "k_vrh": 17.5}, MODULUS_TARGETS),
        ("ordered_moduli", {"k_vrh": None, "k_reuss": 20.0}, {"g_reuss": 9 + 1e-9}, MODULUS_TARGETS),
        ("max_modulus", {"k_voigt": 1000.5}, {"k_voigt": 1000.0}, MODULUS_TARGETS),
    ],
)
def test_each_filter_removes_its_own_and_nothing_else(run, salt, key, removed, kept, targets):
    rows, funnel = run(variants(salt, removed, kept), OFF | {key: PAPER[key]})
    hit = list(TARGET_ORDER) if targets == "all" else targets
    by_id = {row["material_id"]: row["targets"] for row in rows}
    assert by_id.get("m-0", []) == [
        name
        for name in TARGET_ORDER
        if name not in hit and not (name == "log_bulk_modulus" and removed.get("k_vrh", 1) is None)
    ]
    assert by_id["m-1"] == by_id["salt-1"] == list(TARGET_ORDER)
    step = next(step for step in funnel["steps"] if step["filter"] == key)
    assert step == {"filter": key, "applies_to": hit, "removed": 1, "left": 2}
    for name in TARGET_ORDER:
        steps = {step["filter"]: step for step in funnel["targets"][name]["steps"]}
        assert (key in steps) == (name in hit)
    rows, _ = run(variants(salt, removed), OFF)
    assert len(rows) == 2, "switched off, it removes nothing"


def test_abx3_keeps_perovskite_formulas_alone(run, salt):
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    cubic = {"species": ["Ca", "Ti", "O", "O", "O"], "frac_coords": sites}
    rows, funnel = run(variants(salt, cubic), OFF | {"abx3": True})
    assert [row["material_id"] for row in rows] == ["m-0"]
    assert {"filter": "abx3", "applies_to": list(TARGET_ORDER), "removed": 1, "left": 1} in funnel["steps"]


def test_missing_values_are_counted_and_only_cost_their_target(run, salt):
    rows, funnel = run(variants(salt, {"band_gap": None}, dict.fromkeys(MODULI)), PAPER)
    assert [row["targets"] for row in rows] == [
        list(TARGET_ORDER),
        [name for name in TARGET_ORDER if name != "band_gap"],
        [name for name in TARGET_ORDER if name not in MODULUS_TARGETS],
    ]
    assert [row["band_gap"] for row in rows] == [5.1, None, 5.1]
    steps = {step["filter"]: step for step in funnel["targets"]["band_gap"]["steps"]}
    assert steps["no value"] == {"filter": "no value", "removed": 1, "left": 2}


def test_null_energy_above_hull_has_a_reason_of_its_own(run, salt):
    rows, funnel = run(
        variants(salt, {"energy_above_hull": None}, {"formation_energy_per_atom": None}), PAPER
    )
    assert [row["material_id"] for row in rows] == ["salt-1"]
    steps = {step["filter"]: step["removed"] for step in funnel["steps"]}
    assert (steps["no energy above hull"], steps["no formation energy"]) == (1, 1)
    assert (steps["max_energy_above_hull"], steps["max_formation_energy"]) == (0, 0)


def test_modulus_without_logarithm_never_becomes_a_target(run, salt):
    rows, funnel = run(variants(salt, {"g_vrh": -1.0}), OFF)
    assert rows[1]["targets"] == [name for name in TARGET_ORDER if name != "log_shear_modulus"]
    assert funnel["targets"]["log_shear_modulus"]["steps"][-1] == {
        "filter": "no logarithm",
        "removed": 1,
        "left": 1,
    }


def test_nothing_left_names_the_filter(run, salt, tmp_path):
    with pytest.raises(InputError, match=r"2 of 2 fell to 'no energy above hull'; switch that filter off"):
        run([salt | {"energy_above_hull": None, "material_id": str(i)} for i in range(2)], PAPER)
    assert not (tmp_path / "materials.parquet").exists()


def test_funnel_adds_up_and_does_not_depend_on_row_groups(run, salt):
    changes = [
        {"band_gap": 0.0},
        {"g_vrh": -1.0},
        {"k_voigt": 2000.0},
        {"species": ["Xe", "Cl"]},
        {"k_vrh": None},
    ]
    records = variants(salt, *changes, *changes)
    rows, funnel = run(records, PAPER)
    assert funnel["n_collected"] == 11
    assert funnel["n_kept"] == len(rows) == 9
    assert funnel["rejected_by_reason"] == {"missing structure": 3}
    assert set(funnel["targets"]) == set(TARGET_ORDER)
    for target, counts in funnel["targets"].items():
        left = funnel["n_collected"]
        for step in counts["steps"]:
            left -= step["removed"]
            assert step["left"] == left
        assert counts["n"] == left == sum(target in row["targets"] for row in rows)
    in_groups, other = run(records, PAPER, group=2)
    assert in_groups == rows
    assert other | {"materials_sha256": None} == funnel | {"materials_sha256": None}


def test_a_corrected_label_changes_the_funnel_whose_counts_stay(run, salt):
    """Jobs wait for the funnel, which is small, and not for the materials."""
    _, before = run(variants(salt, {}), PAPER)
    _, same = run(variants(salt, {}), PAPER)
    _, after = run(variants(salt, {"energy_per_atom": -3.5}), PAPER)
    assert before == same and after["materials_sha256"] != before["materials_sha256"]
    assert after | {"materials_sha256": None} == before | {"materials_sha256": None}


def test_only_the_configured_targets_are_filtered_for(run, salt):
    rows, funnel = run(variants(salt, {"band_gap": None}), PAPER, targets=["band_gap"])
    assert [row["targets"] for row in rows] == [["band_gap"]]
    assert "positive_moduli" not in {step["filter"] for step in funnel["steps"]}


def test_sample_comes_first_and_depends_on_ids_and_seed_alone(run, salt):
    records = variants(salt, *[{"band_gap": 1.0}] * 29)

    def draw(crystals, size, seed):
        rows, funnel = run(crystals, OFF, sample=size, seed=seed)
        assert funnel["n_collected"] == 30
        removed = {"filter": "sample", "applies_to": list(TARGET_ORDER), "removed": 30 - size, "left": size}
        assert funnel["steps"][0] == removed
        return {row["material_id"] for row in rows}

    drawn = draw(records, 10, 0)
    assert len(drawn) == 10
    assert draw(records[::-1], 10, 0) == drawn
    assert draw(records, 10, 1) != drawn
    assert draw(records, 20, 0) > drawn
    assert (
        len(run(records, OFF, sample=31, seed=0)[0]) == len(run(records, OFF, sample=None, seed=0)[0]) == 30
    )


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({"k_reuss": 8.0}, False),
        ({"g_vrh": 9.0}, False),
        ({"k_reuss": 8 - 1e-9}, False),  # one number, up to rounding
        ({"g_vrh": None}, False),
        ({"k_reuss": 7.9, "g_voigt": 8.1}, True),
    ],
)
def test_strict_order_wants_each_average_and_each_larger(run, salt, change, stays):
    ordered = {
        f"{letter}_{kind}": x for letter in "kg" for kind, x in (("reuss", 7), ("vrh", 8), ("voigt", 9))
    }
    rows, funnel = run(variants(salt | ordered, change), OFF | {"ordered_moduli": "strict"})
    kept = {row["material_id"] for row in rows if "log_bulk_modulus" in row["targets"]}
    assert kept == ({"salt-1", "m-0"} if stays else {"salt-1"})
    assert funnel["targets"]["log_bulk_modulus"]["n"] == len(kept)


def raw_rows(file):
    with zstandard.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def six_moduli(row):
    """Reuss, VRH and Voigt of K, then of G, in GPa."""
    return [
        [(row[name] or {}).get(kind) for kind in ("reuss", "vrh", "voigt")]
        for name in ("bulk_modulus", "shear_modulus")
    ]


def count_by_hand(rows, order):
    """Removed by each rule, as the paper lists them, for the modulus targets: a loop over the file itself."""
    removed, left = {}, 0
    for row in rows:
        formation, averages = row["formation_energy_per_atom"], six_moduli(row)
        flat = [value for average in averages for value in average if value is not None]
        if formation is None:
            rule = "no formation energy"
        elif formation > 0.15:
            rule = "max_formation_energy"
        elif formation < -10:
            rule = "min_formation_energy"
        elif {"He", "Ne", "Ar", "Kr", "Xe", "Rn"} & set(row["species"]):
            rule = "exclude_noble_gases"
        elif averages[0][1] is None:
            rule = "no value"
        elif min(flat) <= 0:
            rule = "positive_moduli"
        elif not all(order(*average) for average in averages):
            rule = "ordered_moduli"
        elif max(flat) > 1000:
            rule = "max_modulus"
        else:
            left += 1
            continue
        removed[rule] = removed.get(rule, 0) + 1
    return removed, left


def is_ordered(reuss, vrh, voigt):
    return reuss <= vrh <= voigt


def is_strictly_ordered(reuss, vrh, voigt):
    return reuss < vrh < voigt


@pytest.mark.parametrize(("setting", "order"), [(True, is_ordered), ("strict", is_strictly_ordered)])
def test_real_moduli_as_counted_by_hand(run, elastic4, shared_data, setting, order):
    raw = raw_rows(shared_data / "elastic4.jsonl.zst")
    removed, left = count_by_hand(raw, order)
    broken = [row["material_id"] for row in raw if any(a[0] and a[0] > a[2] for a in six_moduli(row))]
    assert len(broken) > 10, "there are crystals to break the rule with"
    filters = PAPER | {"max_energy_above_hull": None, "ordered_moduli": setting}
    rows, funnel = run(elastic4 / "collected.parquet", filters, targets=MODULUS_TARGETS)
    for target in MODULUS_TARGETS:
        counts = funnel["targets"][target]
        assert {step["filter"]: step["removed"] for step in counts["steps"] if step["removed"]} == removed
        assert counts["n"] == left == len(rows)
    assert not {row["material_id"] for row in rows} & set(broken)
    assert {"positive_moduli", "ordered_moduli", "max_modulus", "max_formation_energy"} <= set(removed)


def test_strict_order_drops_the_cubic_crystals(run, elastic4):
    def cubic(setting):
        filters = PAPER | {"max_energy_above_hull": None, "ordered_moduli": setting}
        rows, _ = run(elastic4 / "collected.parquet", filters, targets=MODULUS_TARGETS)
        return [row for row in rows if row["spacegroup"] >= 195]

    kept, strictly = cubic(True), cubic("strict")
    one_number = sum(row["k_reuss"] == row["k_vrh"] == row["k_voigt"] for row in kept)
    assert one_number > 600
    # The few that stay have a bulk modulus that is not one number, as symmetry wants it: noise of the tensor.
    assert all(row["k_reuss"] < row["k_vrh"] < row["k_voigt"] for row in strictly)
    assert len(strictly) < 0.03 * len(kept)


def test_the_letter_of_the_second_bound_on_formation_energy_leaves_nothing(run, elastic4, shared_data):
    energies = [row["formation_energy_per_atom"] for row in raw_rows(shared_data / "elastic4.jsonl.zst")]
    assert min(energies) > -10
    letter = PAPER | {
        "max_energy_above_hull": None,
        "max_formation_energy": -10.0,
        "min_formation_energy": None,
    }
    with pytest.raises(InputError, match="no material is left; 2880 of 2880 fell to 'max_formation_energy'"):
        run(elastic4 / "collected.parquet", letter)


def test_crystals_without_labels_are_refused_with_what_to_do(run, elastic4, tmp_path):
    table = pq.read_table(elastic4 / "collected.parquet")
    place = table.schema.get_field_index("band_gap")
    bare = table.set_column(place, "band_gap", pa.nulls(len(table), pa.float64()))
    pq.write_table(bare, tmp_path / "collected.parquet")
    shutil.copy(elastic4 / "manifest.json", tmp_path)
    with pytest.raises(
        InputError, match=r"fell to 'no value'; map one of band_gap in .*CIF files need labels"
    ):
        run(tmp_path / "collected.parquet", {}, ["band_gap"])


@pytest.mark.parametrize("limit", [0.15, 0.05, 0.0])
def test_real_energies_above_hull_as_counted_by_hand(run, hull, shared_data, limit):
    raw = raw_rows(shared_data / "mp20_hull.jsonl.zst")
    wanted = [row for row in raw if row["formation_energy_per_atom"] <= 0.15]
    expected = {row["material_id"] for row in wanted if row["e_above_hull"] <= limit}
    filters = PAPER | {"max_energy_above_hull": limit, "exclude_noble_gases": False}
    rows, funnel = run(hull / "collected.parquet", filters, targets=["formation_energy"])
    assert {row["material_id"] for row in rows} == expected
    steps = {step["filter"]: step["removed"] for step in funnel["steps"]}
    assert steps["max_energy_above_hull"] == len(wanted) - len(expected)
    assert steps["max_formation_energy"] == len(raw) - len(wanted)


def test_real_elastic_crystals(run, elastic4):
    rows, funnel = run(
        elastic4 / "collected.parquet", PAPER | {"max_energy_above_hull": None, "exclude_metals": False}
    )
    assert funnel["rejected_by_reason"] == {}
    steps = {step["filter"]: step["removed"] for step in funnel["targets"]["log_bulk_modulus"]["steps"]}
    assert funnel["n_collected"] == 2_880
    assert steps == {
        "no formation energy": 0,
        "max_formation_energy": 11,
        "min_formation_energy": 0,
        "exclude_noble_gases": 0,
        "no value": 228,
        "positive_moduli": 69,
        "ordered_moduli": 26,
        "max_modulus": 9,
        "no logarithm": 0,
    }
    assert {name: counts["n"] for name, counts in funnel["targets"].items()} == {
        "total_energy": 2869,
        "formation_energy": 2869,
        "band_gap": 2869,
        "energy_above_hull": 0,  # which this file does not give
        "log_shear_modulus": 2537,
        "log_bulk_modulus": 2537,
    }
    moduli = np.array(
        [[row[name] for name in MODULI] for row in rows if "log_bulk_modulus" in row["targets"]]
    )
    assert moduli.min() > 0 and moduli.max() <= 1000
    for voigt, reuss, vrh in (moduli[:, :3].T, moduli[:, 3:].T):
        assert (reuss <= vrh + 1e-6).all() and (vrh <= voigt + 1e-6).all()
    isotropic = sum(row["g_voigt"] is not None and row["k_voigt"] == row["k_reuss"] for row in rows)
    assert isotropic > 500, "cubic crystals have one bulk modulus, and stay"


def test_every_noble_gas_is_one(run, salt):
    gases = ["He", "Ne", "Ar", "Kr", "Xe", "Rn", "Og"]
    records = variants(salt, *({"species": ["Cs", gas]} for gas in gases))
    rows, funnel = run(records, OFF | {"exclude_noble_gases": True})
    assert [row["material_id"] for row in rows] == ["salt-1"]
    steps = {step["filter"]: step["removed"] for step in funnel["steps"]}
    assert steps["exclude_noble_gases"] == len(gases)
