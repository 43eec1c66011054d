import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teal.engine.weights.checkpoint import from_folder
from teal.engine.weights.transformers import from_model
from teal.foundation.errors import UserError
from tests.engine.decoding import assert_same_weights, tensors_of
from tests.helpers import ENGINE_FAMILIES, tiny_model

CPU = torch.device("cpu")
every_family = pytest.mark.parametrize("family", ENGINE_FAMILIES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def change_weights(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_a_folder_are_those_of_its_model(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    weights = from_folder(tmp_path, None, CPU)
    assert (weights.head is weights.embedding) is tied
    assert_same_weights(weights, from_model(model))


def test_weights_of_a_sharded_checkpoint_are_the_same(sharded: Path) -> None:
    assert_same_weights(from_folder(sharded, None, CPU), from_model(tiny_model("llama")))


def test_weights_are_cast_to_the_dtype_asked_for(folder: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    weights = from_folder(folder, torch.bfloat16, CPU)
    assert weights.dtype == torch.bfloat16
    assert_same_weights(weights, from_model(model))


def test_weights_keep_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.float16).save_pretrained(tmp_path)
    assert from_folder(tmp_path, None, CPU).dtype == torch.float16


def test_weights_reach_the_device(folder: Path, device: torch.device) -> None:
    tensors = tensors_of(from_folder(folder, None, device))
    assert {tensor.device.type for tensor in tensors if tensor is not None} == {device.type}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, r"lack model\.layers\.1\.mlp\.up_pro.* Use"),
        ({"lm_head.weight": None}, r"lack lm_head\.weight\. Use a complete checkpoint"),
        ({"model.norm.weight": torch.ones(7)}, r"has shape \(7,\), the conf.* says \(32,\)\. Use"),
        ({"model.layers.0.extra": torch.ones(1)}, r"holds model\.layers\.0\.extra, .* Run the"),
    ],
    ids=["projection", "head", "shape", "unknown"],
)
def test_checkpoint_that_does_not_fit_its_configuration_is_refused(
    folder: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    change_weights(folder, changes)
    with pytest.raises(UserError, match=message):
        from_folder(folder, None, CPU)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_truncated_weights_are_refused(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors' is missing or damaged .* anew"):
        from_folder(folder, None, CPU)


def test_missing_file_of_several_is_refused_by_name(sharded: Path) -> None:
    last = max(sharded.glob("*.safetensors"))
    last.unlink()
    with pytest.raises(UserError, match=rf"{last.name}' is missing or damaged"):
        from_folder(sharded, None, CPU)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_index_without_a_map_is_refused(sharded: Path, content: dict[str, object]) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"index\.json' has no weight_map\. Copy it"):
        from_folder(sharded, None, CPU)


def test_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor .* save_pretrained"):
        from_folder(folder, None, CPU)


def test_folder_that_does_not_fit_the_device_is_refused_before_reading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teal.engine.weights.memory.free_memory", lambda device: 1000)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^The weights need 0\.0 GB and cpu has 0\.0 GB free"):
        from_folder(folder, None, CPU)
