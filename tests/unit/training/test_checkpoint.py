import logging
import resource

import pytest
import torch

from castbench.errors import InputError
from castbench.training.checkpoint import encode, read_checkpoint, read_metadata, write_checkpoint


def tensors(step):
    return {"a/weight": torch.full((3, 2), float(step)), "b": torch.tensor(step), "c": torch.ones(2).double()}


@pytest.fixture
def folder(tmp_path):
    for step in (5, 20, 100):
        write_checkpoint(tmp_path, step, tensors(step), {"key": "k", "step": step, "history": [{"x": 0.1}]})
    return tmp_path


def steps(folder):
    return sorted(int(path.name.split("-")[0]) for path in folder.iterdir())


def test_the_last_two_are_kept_and_the_newest_is_read(folder):
    assert steps(folder) == [20, 100]
    read, metadata = read_checkpoint(folder, "k")
    assert metadata == {"key": "k", "step": 100, "history": [{"x": 0.1}]}
    assert all(torch.equal(read[name], value) for name, value in tensors(100).items())
    assert read["c"].dtype == torch.float64 and read["b"].shape == ()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_newest_one_falls_back_with_a_warning(folder, caplog, damage):
    newest = max(folder.iterdir())
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes({"truncated": content[:-10], "flipped": content, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        read, metadata = read_checkpoint(folder, "k")
    assert metadata["step"] == 20 and read["b"] == 20
    assert "damaged" in caplog.text and newest.name in caplog.text


def test_a_full_disk_is_one_line_and_leaves_the_older_ones(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(InputError, match=r"000000101-.*cannot be written \(file too large\); make space"):
            write_checkpoint(folder, 101, tensors(101), {"key": "k"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert read_checkpoint(folder, "k")[1]["step"] == 100


def test_other_settings_start_anew_with_a_log_line(folder, caplog):
    with caplog.at_level(logging.INFO):
        assert read_checkpoint(folder, "other") is None
    assert "of other settings, data or code" in caplog.text
    write_checkpoint(folder, 1, tensors(1), {"key": "other"})
    assert steps(folder) == [1]  # an old one with a higher step does not push it out


def test_no_folder_is_no_checkpoint(tmp_path):
    assert read_checkpoint(tmp_path / "none", "k") is None


def test_a_file_that_was_being_written_is_not_read(folder):
    (folder / ".000000200-0.safetensors.1.partial").write_bytes(b"half")
    assert read_checkpoint(folder, "k")[1]["step"] == 100


def test_equal_content_gives_equal_bytes_and_metadata_come_back(tmp_path):
    metadata = {name: i for i, name in enumerate("zyxwvutsr")}
    content = encode(tensors(1), metadata)
    assert content == encode(dict(reversed(tensors(1).items())), dict(reversed(metadata.items())))
    (tmp_path / "f.safetensors").write_bytes(content)
    assert read_metadata(tmp_path / "f.safetensors") == metadata


def test_a_run_without_a_result_has_a_valid_file():
    from safetensors.torch import load

    assert load(encode({}, {"status": "failed"})) == {}
