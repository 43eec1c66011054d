import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal.compression import quantize_model, save_quantized
from teal.foundation.errors import UserError
from teal.models.loading import load_model, load_tokenizer
from teal.models.weight_format import weight_format_of
from teal.quantization import Scheme
from tests.helpers import logits_of, tiny_tokens
from tests.quantized_folders import CHECKPOINTS, write_checkpoint

MODEL = str(Path(__file__).parents[2] / "models/py-16m")


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_published_checkpoints_are_opened_with_dequantized_weights(
    kind: str, tmp_path: Path
) -> None:
    expected = write_checkpoint(tmp_path, kind)
    model = load_model(str(tmp_path), dtype="float32", device="cpu")
    assert weight_format_of(model) == "int4"
    assert not hasattr(model.config, "quantization_config")
    found = model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_tied", [False, True])
def test_quantized_head_is_dequantized_and_not_tied_to_the_embedding(
    is_tied: bool, tmp_path: Path
) -> None:
    expected = write_checkpoint(tmp_path, "gptq", has_head=True)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": is_tied}))
    model = load_model(str(tmp_path), dtype="float32", device="cpu")
    torch.testing.assert_close(model.lm_head.weight, expected.lm_head.weight, rtol=1e-6, atol=0)
    assert torch.equal(model.model.embed_tokens.weight, expected.model.embed_tokens.weight)


@pytest.mark.parametrize("weight_format", ["int8", "fp8", "int4"])
def test_saved_quantized_model_has_the_logits_of_the_model_in_memory(
    weight_format: str, tmp_path: Path
) -> None:
    model = load_model(MODEL, device="cpu")
    scheme = Scheme(format=weight_format)
    weights = quantize_model(model, scheme)
    save_quantized(tmp_path / "model", model, load_tokenizer(MODEL), weights, scheme)
    opened = load_model(str(tmp_path / "model"), device="cpu")
    assert weight_format_of(opened) == weight_format
    assert opened.generation_config.eos_token_id == model.generation_config.eos_token_id
    tokens = tiny_tokens(2, 16)
    assert torch.equal(logits_of(opened, tokens), logits_of(model, tokens))


def test_zero_bias_that_gptq_adds_is_ignored_and_any_other_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    write_checkpoint(tmp_path, "gptq", **{name: torch.zeros(32)})
    assert name not in load_model(str(tmp_path), device="cpu").state_dict()
    write_checkpoint(tmp_path, "gptq", **{name: torch.ones(32)})
    with pytest.raises(UserError, match=rf"holds {name}, which the model does not have\. Use"):
        load_model(str(tmp_path), device="cpu")


def test_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path, "awq")
    split_in_two(tmp_path)
    model = load_model(str(tmp_path), dtype="float32", device="cpu")
    tokens = tiny_tokens(2, 16)
    torch.testing.assert_close(logits_of(model, tokens), logits_of(expected, tokens))


def test_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq", **{"model.norm.weight": None})
    with pytest.raises(UserError, match=r"lack model\.norm\.weight\. Use a complete"):
        load_model(str(tmp_path), device="cpu")


def test_unknown_quantization_method_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"awq"', '"hqq"'))
    with pytest.raises(UserError, match="'hqq' is not supported"):
        load_model(str(tmp_path), device="cpu")


def split_in_two(folder: Path) -> None:
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, half in enumerate((tensors[::2], tensors[1::2])):
        save_file(dict(half), folder / f"part-{number}.safetensors")
        weight_map |= {name: f"part-{number}.safetensors" for name, _ in half}
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
