import math

import pytest

from castbench.errors import InputError
from castbench.materials.records import LABELS, SCHEMA, Columns, look_up, read_label, to_table


def test_path_descends_and_prefers_a_key_with_dots():
    record = {"labels": {"bulk": {"vrh": 3.0}}, "labels.bulk": 4.0, "flat": 1}
    assert look_up(record, "labels.bulk.vrh") == 3.0
    assert look_up(record, "labels.bulk") == 4.0
    assert look_up(record, "flat.deeper") is None
    assert look_up(record, "absent") is None


@pytest.mark.parametrize(("given", "expected"), [("1.5", 1.5), (" 2 ", 2.0), (0, 0.0), (-0.0005, -0.0005)])
def test_label_that_is_a_number(given, expected):
    assert read_label(given, "band_gap") == expected


@pytest.mark.parametrize(
    "given", ["", "a lot", math.nan, math.inf, "nan", True, None, [1], {"vrh": 1}, -3, 1e9]
)
def test_label_that_is_no_possible_gap(given):
    assert read_label(given, "band_gap") is None


def test_wild_moduli_are_left_to_the_filters():
    assert read_label(-14315206718497.0, "g_vrh") == -14315206718497.0


def test_moduli_are_found_under_their_usual_names(salt):
    record = {key: value for key, value in salt.items() if key not in LABELS}
    nested = record | {"bulk_modulus": {"voigt": 3.0, "reuss": 1.0, "vrh": 2.0}, "G_VRH": 7}
    material = Columns({}).read(nested, "a:1", "test")
    assert [material.labels[name] for name in ("k_voigt", "k_reuss", "k_vrh")] == [3.0, 1.0, 2.0]
    assert material.labels["g_vrh"] == 7.0
    assert material.labels["g_voigt"] is None
    assert material.invalid == {}


def test_mapping_replaces_the_default_names(salt):
    material = Columns({"band_gap": "pbe.gap"}).read(salt | {"pbe": {"gap": 1.25}}, "a:1", "test")
    assert material.labels["band_gap"] == 1.25


def test_mapping_to_an_unknown_column_is_refused():
    with pytest.raises(InputError, match="no column is called bandgap"):
        Columns({"bandgap": "gap"})


@pytest.mark.parametrize("identifier", [None, "", "  "])
def test_missing_id_is_made_of_file_and_row(salt, identifier):
    material = Columns({}).read(salt | {"material_id": identifier}, "crystals.jsonl:17", "test")
    assert material.material_id == "crystals.jsonl-17"


def test_table_has_the_schema(salt):
    table = to_table([Columns({}).read(salt, "a:1", "test")])
    assert table.schema.equals(SCHEMA)
    assert table.column("formula").to_pylist() == ["CsCl"]
    assert table.column("spacegroup").to_pylist() == [221]
    assert table.column("n_sites").to_pylist() == [2]
    assert table.column("origin").to_pylist() == ["test"]


@pytest.mark.parametrize(
    ("column", "possible", "impossible"),
    [
        ("energy_per_atom", -1e6, -1e8),  # of all electrons
        ("formation_energy_per_atom", -99.0, -101.0),
        ("formation_energy_per_atom", 99.0, 101.0),
        ("energy_above_hull", -0.9, -1.0),
        ("energy_above_hull", 99.0, 101.0),
        ("band_gap", 99.0, 101.0),
    ],
)
def test_numbers_that_no_crystal_has_are_missing(column, possible, impossible):
    assert read_label(possible, column) == possible
    assert read_label(impossible, column) is None


@pytest.mark.parametrize("identifier", ["mp_id", "id"])
def test_usual_names_need_no_mapping(salt, identifier):
    usual = {"lattice": "cell", "species": "elements", "frac_coords": "frac", "text": "description"}
    usual |= {"material_id": identifier, "energy_above_hull": "e_above_hull"}
    record = {usual.get(name, name): value for name, value in salt.items()}
    found, expected = (Columns({}).read(given, "a:1", "test") for given in (record, salt))
    assert (found.material_id, found.digest()) == (expected.material_id, expected.digest())


@pytest.mark.parametrize(
    "change",
    [
        {"lattice": [[4.2, 0, 0], [0, 4.1, 0], [0, 0, 4.1]]},
        {"species": ["Cs", "Br"]},
        {"frac_coords": [[0, 0, 0], [0.5, 0.5, 0.4]]},
        {"text": "It is salt."},
        {"k_vrh": None},
    ],
)
def test_a_record_with_another_word_is_no_repetition(salt, change):
    one, other = (Columns({}).read(given, "a:1", "test") for given in (salt, salt | change))
    assert one.digest() != other.digest()
    assert one.digest() == Columns({}).read(salt | {"material_id": "b"}, "a:2", "test").digest()


def test_a_text_that_is_none_is_missing(salt):
    for text in ("  ", 7, ["a"]):
        assert Columns({}).read(salt | {"text": text}, "a:1", "test").text is None


def test_a_mapping_may_name_what_the_other_study_reads(collect, salt):
    table, _ = collect([salt], {"formula": "pretty"})
    assert len(table) == 1
