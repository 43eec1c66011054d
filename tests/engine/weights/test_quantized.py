import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teal.compression import quantize_model
from teal.engine.decoder import Decoder
from teal.engine.engine import Engine
from teal.engine.weights.checkpoint import from_folder
from teal.engine.weights.decoder_weights import DecoderWeights, LayerWeights
from teal.engine.weights.loader import open_model
from teal.engine.weights.quantized import bytes_needed, quantized_head
from teal.engine.weights.transformers import from_model
from teal.foundation.errors import UserError
from teal.models.architectures import architecture_of
from teal.models.families import projections_of
from teal.models.loading import load_tokenizer
from teal.quantization import QuantizedWeight, Scheme
from tests.engine.decoding import (
    LENGTH,
    assert_close,
    assert_same_weights,
    decoded,
    plan_at,
    rules_of,
)
from tests.helpers import ENGINE_FAMILIES, plan_for, tiny_model, tiny_tokens
from tests.quantization import packers
from tests.quantized_folders import CHECKPOINTS, write_checkpoint

CPU = torch.device("cpu")
MODEL = Path(__file__).parents[3] / "models/py-16m"
MATRICES = ("qkv", "o", "gate_up", "down")
SCHEMES = {
    "int8": Scheme(format="int8"),
    "fp8": Scheme(format="fp8"),
    "int4": Scheme(format="int4", group_size=32),
    "int4 with zeros": Scheme(format="int4", group_size=32, symmetric=False),
}
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
every_family = pytest.mark.parametrize("family", ENGINE_FAMILIES)


def dequantized(weights: DecoderWeights) -> DecoderWeights:
    """Return dense weights of the same values."""
    layers = tuple(
        replace(layer, **{name: floats(getattr(layer, name)) for name in MATRICES})
        for layer in weights.layers
    )
    head = weights.head
    return replace(
        weights, layers=layers, head=head if isinstance(head, Tensor) else head.dequantize().t()
    )


def floats(matrix: Tensor | QuantizedWeight) -> Tensor:
    return matrix if isinstance(matrix, Tensor) else matrix.dequantize()


def formats(layer: LayerWeights) -> set[str]:
    matrices = [getattr(layer, name) for name in MATRICES]
    return {m.format if isinstance(m, QuantizedWeight) else "floats" for m in matrices}


def pair(model: Any, scheme: Scheme) -> tuple[Decoder, Decoder]:
    """Return decoders of quantized weights and of dense ones with the same values."""
    architecture, weights = architecture_of(model.config), from_model(model, scheme)
    return Decoder(architecture, weights), Decoder(architecture, dequantized(weights))


@every_family
@schemes
def test_quantized_weights_decode_as_their_values_do(family: str, scheme: Scheme) -> None:
    tokens = tiny_tokens(1, LENGTH)[0]
    quantized, dense = pair(tiny_model(family), scheme)
    assert formats(quantized.weights.layers[0]) == {scheme.format}
    assert_close(decoded(quantized, tokens), decoded(dense, tokens))


@schemes
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_sparse_decoding_drops_the_same_channels_with_quantized_weights(
    family: str, scheme: Scheme
) -> None:
    tokens = tiny_tokens(1, LENGTH)[0]
    quantized, dense = pair(tiny_model(family), scheme)
    before = decoded(quantized, tokens)
    rules = rules_of(plan_at(dense, tokens, 0.5))
    for decoder in (quantized, dense):
        decoder.set_rules(rules)
    sparse = decoded(quantized, tokens)
    assert_close(sparse, decoded(dense, tokens))
    assert not torch.allclose(sparse[1:], before[1:], atol=0.1)


@schemes
def test_weights_rounded_from_a_folder_equal_those_rounded_from_its_model(
    scheme: Scheme, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    read = from_folder(tmp_path, None, CPU, scheme)
    assert_same_weights(dequantized(read), dequantized(from_model(model, scheme)))


def test_model_in_memory_keeps_its_floats() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    from_model(model, SCHEMES["int8"])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_quantized_head_gives_the_logits_of_its_values() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, LENGTH)[0]
    architecture = architecture_of(model.config)
    weights = quantized_head(from_model(model))
    assert isinstance(weights.head, QuantizedWeight)
    expected = decoded(Decoder(architecture, dequantized(weights)), tokens)
    assert_close(decoded(Decoder(architecture, weights), tokens), expected)


def test_bytes_needed_count_quantized_weights() -> None:
    architecture = architecture_of(tiny_model("llama", hidden_size=256).config)
    dense, int8, int4 = (
        bytes_needed(architecture, torch.bfloat16, scheme)
        for scheme in (None, SCHEMES["int8"], SCHEMES["int4"])
    )
    assert dense > int8 > int4
    weights = from_model(tiny_model("llama", hidden_size=256).bfloat16(), SCHEMES["int4"])
    assert weights.num_bytes == pytest.approx(int4, rel=0.05)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_quantized_checkpoints_decode_as_the_model_of_their_values(
    kind: str, tmp_path: Path
) -> None:
    model, tokens = write_checkpoint(tmp_path, kind), tiny_tokens(1, LENGTH)[0]
    architecture = architecture_of(model.config)
    weights = from_folder(tmp_path, torch.float32, CPU)
    assert formats(weights.layers[0]) == {"int4"}
    expected = decoded(Decoder(architecture, from_model(model)), tokens)
    logits = decoded(Decoder(architecture, weights), tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_head_quantized_by_the_checkpoint_is_used_as_it_is(kind: str, tmp_path: Path) -> None:
    model, tokens = write_checkpoint(tmp_path, kind, has_head=True), tiny_tokens(1, LENGTH)[0] % 96
    architecture = architecture_of(model.config)
    weights = from_folder(tmp_path, torch.float32, CPU)
    assert isinstance(weights.head, QuantizedWeight)
    assert weights.head.format == "int4"
    assert quantized_head(weights) is weights
    expected = decoded(Decoder(architecture, from_model(model)), tokens)
    logits = decoded(Decoder(architecture, weights), tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_quantized_head_is_read_even_if_the_configuration_ties_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq", has_head=True)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))
    assert isinstance(from_folder(tmp_path, torch.float32, CPU).head, QuantizedWeight)


def test_quantized_embedding_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq", has_head=True)
    tensors = load_file(tmp_path / "model.safetensors")
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("lm_head.")}
    embedding = {
        name.replace("lm_head", "model.embed_tokens"): t.clone() for name, t in head.items()
    }
    save_file(tensors | embedding, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"embedding is quantized.* Use a checkpoint"):
        from_folder(tmp_path, torch.float32, CPU)


def test_bias_of_zeros_that_gptq_adds_is_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    write_checkpoint(tmp_path, "gptq", **{f"{name}.bias": torch.zeros(32)})
    assert from_folder(tmp_path, torch.float32, CPU).layers[0].qkv_bias is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
            r"holds model\.layers\.0\.self_attn\.q_proj\.bias, .* Run the model",
        ),
        (
            {
                "model.layers.1.mlp.up_proj.qweight": None,
                "model.layers.1.mlp.up_proj.weight": torch.ones(64, 32),
            },
            r"only model\.layers\.1\.mlp\.gate_proj are quantized\. Use",
        ),
        ({"model.layers.0.mlp.down_proj.scales": None}, r"lacks scales"),
    ],
    ids=["bias", "half quantized", "no scales"],
)
def test_unsupported_quantized_checkpoint_is_refused(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, "gptq", **changes)
    with pytest.raises(UserError, match=message):
        from_folder(tmp_path, torch.float32, CPU)


def test_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq")
    with pytest.raises(UserError, match=r"quantized already\. Open it without"):
        from_folder(tmp_path, None, CPU, SCHEMES["int8"])


def test_nan_in_fp8_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = dict(model.state_dict())
    for name in projections_of(model):
        codes = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
        tensors[f"{name}.weight"] = codes
        tensors[f"{name}.weight_scale"] = torch.ones(len(codes), 1)
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"].view(torch.uint8)[3, 4] = 0xFF
    model.config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    content["quantization_config"] = packers.compressed_config(weights, "float-quantized")
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name} holds NaN"):
        from_folder(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_engine_generates_as_a_model_of_the_quantized_values(quantize: str) -> None:
    opened = open_model(MODEL, dtype="float32", quantize=quantize, quantize_head=True)
    floats = replace(opened, weights=dequantized(opened.weights))
    prompt = load_tokenizer(str(MODEL))("def read_json(path):")["input_ids"]
    quantized, dense = (
        Engine(model).generate(prompt, max_new_tokens=40).tokens for model in (opened, floats)
    )
    assert quantized == dense


def test_engine_warns_of_a_plan_for_another_weight_format(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    plan = plan_for(model, 0.1)
    Engine(tmp_path, replace(plan, weight_format="int8"), quantize="int8")
    quantize_model(model, SCHEMES["int8"])
    Engine(model, replace(plan, weight_format="int8"))
    assert not caplog.messages
    Engine(tmp_path, plan, quantize="int8")
    Engine(model, plan)
    assert ["float weights, the model has int8" in line for line in caplog.messages] == [True] * 2


def test_quantized_model_in_memory_is_not_quantized_again() -> None:
    model = tiny_model("llama")
    quantize_model(model, SCHEMES["int8"])
    with pytest.raises(UserError, match=r"quantized already\. Open it without"):
        open_model(model, quantize="int4")


def test_engine_quantizes_projections_only() -> None:
    quantized = Engine(MODEL, quantize="int8").decoder().weights
    assert formats(quantized.layers[0]) == {"int8"}
    assert isinstance(quantized.head, Tensor)
    assert quantized.num_bytes < 0.75 * Engine(MODEL).decoder().weights.num_bytes
