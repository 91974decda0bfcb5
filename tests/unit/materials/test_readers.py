import gzip
import json
import tarfile

import pytest
import zstandard

from castbench.errors import InputError
from castbench.materials.readers import fingerprint, read_records
from castbench.materials.structures import RecordError, read_crystal


def lines(count):
    return "".join(json.dumps({"material_id": f"m-{i}", "note": "é"}) + "\n" for i in range(count))


def test_compressed_and_plain_lines_are_the_same(tmp_path):
    plain, zst, gz = (tmp_path / f"a.jsonl{ending}" for ending in ("", ".zst", ".gz"))
    plain.write_text(lines(5), encoding="utf-8")
    zst.write_bytes(zstandard.compress(plain.read_bytes()))
    gz.write_bytes(gzip.compress(plain.read_bytes()))
    expected = [record for _, record in read_records(plain)]
    assert expected[4] == {"material_id": "m-4", "note": "é"}
    assert [record for _, record in read_records(zst)] == expected
    assert [record for _, record in read_records(gz)] == expected


def test_lines_that_are_no_records_do_not_stop_the_others(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"material_id": 1}\n\n{"material_id": \n[2]\n{"material_id": 3}\n')
    names, records = zip(*read_records(path), strict=True)
    assert names == ("a.json:1", "a.json:3", "a.json:4", "a.json:5")
    assert [isinstance(record, RecordError) for record in records] == [False, True, True, False]
    assert records[1].reason == "unreadable record"


def test_json_array_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"material_id": 1}]')
    with pytest.raises(InputError, match="one record a line"):
        list(read_records(path))


@pytest.mark.parametrize("ending", ["zst", "gz"])
def test_truncated_file_is_refused(tmp_path, ending):
    compress = zstandard.compress if ending == "zst" else gzip.compress
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(compress(lines(5000).encode())[:-40])
    with pytest.raises(InputError, match=r"cannot be read to its end"):
        list(read_records(path))


def test_damaged_parquet_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        list(read_records(path))


def test_csv_with_long_cells_and_a_short_row(tmp_path, salt_cif):
    path = tmp_path / "a.csv.zst"
    long = salt_cif + "# a comment\n" * 20_000
    path.write_bytes(zstandard.compress(f'id,cif,band_gap\nx,"{long}",1.5\ny,\nz,"{salt_cif}",\n'.encode()))
    records = [record for _, record in read_records(path)]
    assert records[0] == {"id": "x", "cif": long, "band_gap": "1.5"}
    assert isinstance(records[1], RecordError)
    assert records[2] == {"id": "z", "cif": salt_cif, "band_gap": None}


def test_labels_of_cif_files_stand_in_a_table_beside_them(tmp_path, salt_cif):
    folder = tmp_path / "crystals"
    folder.mkdir()
    for name in ("a.cif", "B.CIF", "c.cif"):
        (folder / name).write_text(salt_cif)
    rows = ["file,band_gap", "B.CIF,2.5", "a,1.5", "absent,3", "a,4", "short"]
    (folder / "labels.csv").write_text("\n".join(rows))
    archive = tmp_path / "crystals.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, "crystals")
    for path in (folder, archive):
        found = dict(read_records(path))
        gaps = {name: found[name].get("band_gap") for name in ("a.cif", "B.CIF", "c.cif")}
        assert gaps == {"a.cif": "1.5", "B.CIF": "2.5", "c.cif": None}
        assert found["B.CIF"]["material_id"] == "B"
        wrong = {name: record.reason for name, record in found.items() if isinstance(record, RecordError)}
        assert wrong == {
            "labels.csv:3": "missing structure",
            "labels.csv:4": "duplicate id",
            "labels.csv:5": "unreadable record",
        }
    before = fingerprint(folder)["sha256"]
    (folder / "labels.csv").write_text("file,band_gap\na,2\n")
    assert fingerprint(folder)["sha256"] != before


def test_a_cif_of_several_crystals_is_a_record_each(tmp_path, salt_cif):
    path = tmp_path / "two.cif"
    path.write_text(f"data_global\n_journal_year 2020\n{salt_cif}\n{salt_cif}")
    names, records = zip(*read_records(path), strict=True)
    assert names == ("two.cif:1", "two.cif:2")
    assert [record["material_id"] for record in records] == ["two-1", "two-2"]
    assert all(record["cif"].strip() == salt_cif.strip() for record in records)
    with pytest.raises(RecordError, match="the CIF holds 2") as error:
        read_crystal({"cif": path.read_text()})
    assert error.value.reason == "several crystals"


def test_folder_and_archive_of_cifs_give_the_same_records(tmp_path, salt_cif):
    folder = tmp_path / "crystals"
    (folder / "more").mkdir(parents=True)
    for name in ("b.cif", "a.cif", "more/c.cif", "._a.cif", "notes.txt"):
        (folder / name).write_text(salt_cif)
    (folder / "d.cif.gz").write_bytes(gzip.compress(salt_cif.encode()))
    (folder / "labels.csv").write_text("file,band_gap\nd.cif.gz,2")
    archive = tmp_path / "crystals.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "crystals")
    expected = {name: {"material_id": name, "cif": salt_cif} for name in "abdc"}
    expected["d"] |= {"file": "d.cif.gz", "band_gap": "2"}
    assert [record for _, record in read_records(folder)] == list(expected.values())
    assert {record["material_id"]: record for _, record in read_records(archive)} == expected


def test_the_mark_that_some_programs_begin_a_file_with_is_no_part_of_it(tmp_path):
    path = tmp_path / "crystals.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b"}\n', encoding="utf-8-sig")
    assert [record for _, record in read_records(path)] == [{"id": "a"}, {"id": "b"}]


def test_fingerprint_of_a_folder_follows_its_files(tmp_path, salt_cif):
    (tmp_path / "a.cif").write_text(salt_cif)
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("not read")
    assert fingerprint(tmp_path) == before
    (tmp_path / "a.cif").write_text(salt_cif + "\n")
    assert fingerprint(tmp_path)["sha256"] != before["sha256"]


def test_unknown_kind_and_absent_file_are_refused(tmp_path):
    (tmp_path / "a.xyz").touch()
    with pytest.raises(InputError, match="unknown kind"):
        list(read_records(tmp_path / "a.xyz"))
    with pytest.raises(InputError, match="no such file"):
        list(read_records(tmp_path / "b.jsonl"))


def test_real_archive_of_cifs(shared_data):
    records = read_records(shared_data / "elastic4_cifs.tar.zst")
    name, record = next(records)
    assert name == f"{record['material_id']}.cif"
    assert record["cif"].startswith(("data_", "#"))


def test_a_table_that_begins_with_a_mark_of_its_encoding(tmp_path, salt_cif):
    """As spreadsheets write CSV."""
    path = tmp_path / "a.csv"
    path.write_text(f'id,cif\nx,"{salt_cif}"\n', encoding="utf-8-sig")
    assert [record for _, record in read_records(path)] == [{"id": "x", "cif": salt_cif}]


def test_labels_do_not_replace_the_crystal_that_they_are_of(tmp_path, salt_cif):
    (tmp_path / "a.cif").write_text(salt_cif)
    (tmp_path / "labels.csv").write_text("material_id,cif,band_gap\n a.cif ,in the folder,1.5\n")
    assert [record for _, record in read_records(tmp_path)] == [
        {"material_id": "a", "cif": salt_cif, "band_gap": "1.5"}
    ]


def test_compressed_cifs_of_a_folder_are_read(tmp_path, salt_cif):
    (tmp_path / "a.cif.gz").write_bytes(gzip.compress(salt_cif.encode()))
    (tmp_path / "b.cif.zst").write_bytes(zstandard.compress(salt_cif.encode()))
    assert [record for _, record in read_records(tmp_path)] == [
        {"material_id": name, "cif": salt_cif} for name in "ab"
    ]


def test_fingerprint_of_a_folder_follows_its_names(tmp_path, salt_cif):
    """They are the ids."""
    (tmp_path / "a.cif").write_text(salt_cif)
    before = fingerprint(tmp_path)["sha256"]
    (tmp_path / "a.cif").rename(tmp_path / "b.cif")
    assert fingerprint(tmp_path)["sha256"] != before
