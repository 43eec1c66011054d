import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from teal.checkpoints.files import CheckpointFiles
from teal.foundation.errors import UserError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4).half()}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path, {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}})
    return tmp_path


def write_index(folder: Path, content: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_every_tensor_is_read_in_its_own_dtype(layout: str, request: pytest.FixtureRequest) -> None:
    files = CheckpointFiles(request.getfixturevalue(layout))
    assert files.names == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert files.tensor(name).dtype == tensor.dtype
        assert torch.equal(files.tensor(name), tensor)


def test_file_of_a_tensor_is_the_one_that_the_index_names(sharded: Path) -> None:
    assert CheckpointFiles(sharded).file_of("a.weight") == sharded / "a.weight.safetensors"


def test_file_of_a_tensor_is_the_single_file_without_an_index(single: Path) -> None:
    assert CheckpointFiles(single).file_of("a.weight") == single / "model.safetensors"


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_stray_safetensors_files_do_not_count(layout: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    size = CheckpointFiles(folder).nbytes
    save_file({"stray": torch.ones(9)}, folder / "consolidated.safetensors")
    files = CheckpointFiles(folder)
    assert (files.names, files.nbytes) == (TENSORS.keys(), size)


def test_an_index_wins_over_a_single_file(sharded: Path) -> None:
    save_file({"other": torch.ones(2)}, sharded / "model.safetensors")
    assert CheckpointFiles(sharded).names == TENSORS.keys()


def test_size_is_that_of_all_files_together(sharded: Path) -> None:
    sizes = [path.stat().st_size for path in sharded.glob("*.safetensors")]
    assert CheckpointFiles(sharded).nbytes == sum(sizes)


def test_missing_tensor_is_refused_by_name(single: Path) -> None:
    files = CheckpointFiles(single)
    for read in (files.tensor, files.file_of):
        with pytest.raises(UserError, match=r"lack c\.weight\. Use a complete checkpoint"):
            read("c.weight")


@pytest.mark.parametrize("kept", [0, 4, 100, -4])
def test_truncated_file_is_refused_on_opening(kept: int, single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors' is missing or damaged .* anew"):
        CheckpointFiles(single)


def test_missing_file_of_several_is_refused_when_it_is_needed(sharded: Path) -> None:
    (sharded / "b.weight.safetensors").unlink()
    files = CheckpointFiles(sharded)
    assert torch.equal(files.tensor("a.weight"), TENSORS["a.weight"])
    with pytest.raises(UserError, match=r"b\.weight\.safetensors' is missing or damaged"):
        files.tensor("b.weight")
    with pytest.raises(UserError, match=r"b\.weight\.safetensors' is missing or damaged"):
        _ = files.nbytes


def test_tensor_that_the_index_places_in_another_file_is_refused(sharded: Path) -> None:
    write_index(sharded, {"weight_map": dict.fromkeys(TENSORS, "a.weight.safetensors")})
    with pytest.raises(UserError, match=r"a\.weight\.safetensors' is missing or damaged"):
        CheckpointFiles(sharded).tensor("b.weight")


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}], ids=str)
def test_index_without_a_map_is_refused(content: object, sharded: Path) -> None:
    write_index(sharded, content)
    with pytest.raises(UserError, match=r"index\.json' has no weight_map\. Copy it"):
        CheckpointFiles(sharded)


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor .* save_pretrained"):
        CheckpointFiles(tmp_path)
