import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from teal.checkpoints.quantized import QuantizedCheckpoint
from teal.foundation.errors import UserError
from tests.quantization import packers
from tests.quantization.packers import (
    awq_config,
    awq_tensors,
    compressed_config,
    gptq_config,
    gptq_tensors,
    int_weights,
    packed_tensors,
    random_codes,
    symmetric,
    write_checkpoint,
)

NAMES = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]

METHODS = {
    "awq": (awq_config(), awq_tensors),
    "compressed-tensors": (compressed_config(int_weights(), "pack-quantized"), packed_tensors),
    "gptq": (gptq_config(), gptq_tensors),
}


def drawn(seed: int) -> packers.Codes:
    return symmetric(random_codes(seed=seed))


def written(folder: Path, method: str = "awq", **changes: Any) -> Path:
    config, tensors_of = METHODS[method]
    projections = {name: tensors_of(drawn(seed)) for seed, name in enumerate(NAMES)}
    return write_checkpoint(folder, {**config, **changes}, projections)


@pytest.mark.parametrize("method", METHODS)
def test_every_projection_is_read_by_its_name(method: str, tmp_path: Path) -> None:
    checkpoint = QuantizedCheckpoint(written(tmp_path, method))
    assert (checkpoint.method, checkpoint.names) == (method, NAMES)
    for seed, (name, weight) in enumerate(checkpoint):
        assert name == NAMES[seed]
        assert torch.equal(weight.dequantize(torch.float64), drawn(seed).weight)


def test_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    projections = {name: awq_tensors(drawn(seed)) for seed, name in enumerate(NAMES)}
    write_checkpoint(tmp_path, awq_config(), projections)
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for seed, name in enumerate(NAMES):
        tensors = {f"{name}.{suffix}": t for suffix, t in awq_tensors(drawn(seed)).items()}
        save_file(tensors, tmp_path / f"part-{seed}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"part-{seed}.safetensors")
    index = {"weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = dict(QuantizedCheckpoint(tmp_path))
    assert list(weights) == NAMES
    assert torch.equal(weights[NAMES[1]].dequantize(torch.float64), drawn(1).weight)


def test_bias_of_a_quantized_projection_is_ignored(tmp_path: Path) -> None:
    tensors = {**awq_tensors(drawn(0)), "bias": torch.zeros(48)}
    write_checkpoint(tmp_path, awq_config(), {NAMES[0]: tensors})
    assert QuantizedCheckpoint(tmp_path).read(NAMES[0]).shape == (64, 48)


def test_dense_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, None, {})
    with pytest.raises(UserError, match="is not quantized"):
        QuantizedCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"quant_method": "bitsandbytes"}, "'bitsandbytes'.*awq.*gptq", id="method"),
        pytest.param({"quant_method": None}, "not supported", id="no method"),
        pytest.param({"bits": 2}, "2 bits", id="bits"),
        pytest.param({"group_size": None}, "is damaged", id="group size"),
    ],
)
def test_unsupported_configuration_is_refused_before_any_tensor_is_read(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        QuantizedCheckpoint(written(tmp_path, **changes))


def test_configuration_that_is_no_object_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": 4}')
    with pytest.raises(UserError, match="no JSON object"):
        QuantizedCheckpoint(tmp_path)


def test_folder_without_quantized_tensors_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, awq_config(), {})
    with pytest.raises(UserError, match="holds no qweight"):
        QuantizedCheckpoint(tmp_path)


@pytest.mark.parametrize("suffix", ["qzeros", "scales"])
def test_missing_tensor_is_refused_by_projection_and_name(suffix: str, tmp_path: Path) -> None:
    tensors = awq_tensors(drawn(0))
    del tensors[suffix]
    write_checkpoint(tmp_path, awq_config(), {NAMES[0]: tensors})
    with pytest.raises(UserError, match=rf"Cannot read {NAMES[0]}.*lacks {suffix}"):
        QuantizedCheckpoint(tmp_path).read(NAMES[0])


def test_malformed_tensor_is_refused_in_one_sentence(tmp_path: Path) -> None:
    config, tensors_of = METHODS["compressed-tensors"]
    tensors = {**tensors_of(drawn(0)), "weight_shape": torch.tensor([48])}
    write_checkpoint(tmp_path, config, {NAMES[0]: tensors})
    with pytest.raises(UserError, match=rf"Cannot read {NAMES[0]}.*is damaged"):
        QuantizedCheckpoint(tmp_path).read(NAMES[0])


def test_projection_that_is_not_quantized_is_refused(tmp_path: Path) -> None:
    checkpoint = QuantizedCheckpoint(written(tmp_path))
    with pytest.raises(UserError, match="no quantized lm_head"):
        checkpoint.read("lm_head")


@pytest.mark.parametrize("kept", [0, 4, 100, -200])
def test_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = written(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="missing or damaged"):
        QuantizedCheckpoint(tmp_path)


def test_missing_file_of_several_is_refused_when_it_is_needed(tmp_path: Path) -> None:
    written(tmp_path)
    index = {"weight_map": {f"{NAMES[0]}.qweight": "part-9.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"part-9\.safetensors' is missing or damaged"):
        QuantizedCheckpoint(tmp_path).read(NAMES[0])


def test_index_without_a_map_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        QuantizedCheckpoint(tmp_path)
