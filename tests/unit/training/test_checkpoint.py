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
        write_checkpoint(tmp_path, "k", step, tensors(step), {"step": step, "history": [{"x": 0.1}]})
    return tmp_path


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("*.safetensors"))


def test_the_last_two_are_kept_and_the_newest_is_read(folder):
    assert steps(folder) == [20, 100]
    read, metadata = read_checkpoint(folder, "k")
    assert metadata == {"step": 100, "history": [{"x": 0.1}]}
    assert all(torch.equal(read[name], value) for name, value in tensors(100).items())
    assert read["c"].dtype == torch.float64 and read["b"].shape == ()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_newest_one_falls_back_with_a_warning(folder, caplog, damage):
    newest = max(folder.glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes({"truncated": content[:-10], "flipped": content, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        read, metadata = read_checkpoint(folder, "k")
    assert metadata["step"] == 20 and read["b"] == 20
    assert "damaged" in caplog.text and newest.name in caplog.text
    assert not newest.exists()  # and so none that the next one counts among the newest


def test_a_full_disk_is_one_line_and_leaves_the_older_ones(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(InputError, match=r"000000101-.*cannot be written \(file too large\); make space"):
            write_checkpoint(folder, "k", 101, tensors(101), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert read_checkpoint(folder, "k")[1]["step"] == 100


def test_one_that_cannot_be_read_falls_back_and_stays(folder, caplog):
    newest = max(folder.glob("*.safetensors"))
    newest.unlink()
    newest.symlink_to("/proc/self/mem")  # reading it is an error of input and output
    assert read_checkpoint(folder, "k")[1]["step"] == 20
    assert "cannot be read" in caplog.text and newest.is_symlink()


def test_other_settings_start_anew_with_a_warning_and_those_before_can_be_gone_back_to(folder, caplog):
    assert read_checkpoint(folder, "other") is None
    assert "2 checkpoints are of other settings, data or code" in caplog.text
    assert read_checkpoint(folder, "k2") is None
    write_checkpoint(folder, "other", 1, tensors(1), {})
    write_checkpoint(folder, "other", 2, tensors(2), {})
    assert steps(folder) == [1, 2, 20, 100]  # of neither does the other count
    assert read_checkpoint(folder, "k")[1]["step"] == 100


def test_a_run_that_has_ended_leaves_its_own_alone(folder):
    write_checkpoint(folder, "other", 1, tensors(1), {})
    write_checkpoint(folder, "k", 200, tensors(200), {"step": 200}, last=True)
    assert steps(folder) == [100, 200]
    assert read_checkpoint(folder, "other") is None


def test_no_folder_is_no_checkpoint(tmp_path):
    assert read_checkpoint(tmp_path / "none", "k") is None


def test_a_file_that_was_being_written_is_not_read(folder):
    half = folder / ".k-000000200-0.safetensors.1.partial"
    half.write_bytes(b"half")
    assert read_checkpoint(folder, "k")[1]["step"] == 100
    write_checkpoint(folder, "k", 101, tensors(101), {})
    assert not half.exists()


def test_equal_content_gives_equal_bytes_and_metadata_come_back(tmp_path):
    metadata = {name: i for i, name in enumerate("zyxwvutsr")}
    content = encode(tensors(1), metadata)
    assert content == encode(dict(reversed(tensors(1).items())), dict(reversed(metadata.items())))
    (tmp_path / "f.safetensors").write_bytes(content)
    assert read_metadata(tmp_path / "f.safetensors") == metadata


def test_views_of_tensors_are_written(tmp_path):
    write_checkpoint(tmp_path, "k", 1, {"turned": torch.arange(6.0).view(2, 3).T}, {})
    assert torch.equal(read_checkpoint(tmp_path, "k")[0]["turned"], torch.arange(6.0).view(2, 3).T)


def test_a_run_without_a_result_has_a_valid_file():
    from safetensors.torch import load

    assert load(encode({}, {"status": "failed"})) == {}
