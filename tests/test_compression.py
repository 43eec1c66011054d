import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Never

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from teal import compression
from teal.checkpoints.quantized import QuantizedCheckpoint
from teal.cli.stdlib_text import calibration_text, held_out_text
from teal.compression import quantize_head, quantize_model, save_quantized
from teal.data import TokenWindows, token_windows
from teal.evaluation import compare
from teal.foundation.artifact import read_json
from teal.foundation.errors import UserError
from teal.models.families import FAMILIES, projections_of
from teal.models.loading import load_model, load_tokenizer
from teal.models.weight_format import weight_format_of
from teal.quantization import (
    QuantizedWeight,
    Scheme,
    SecondMoments,
    quantize_by_moments,
    round_to_nearest,
)
from teal.sparsification import sparsify
from tests.cli.conftest import MODEL
from tests.helpers import logits_of, plan_for, tiny_model, tiny_tokens

INT4 = Scheme(format="int4", group_size=32)
SCHEMES = {
    "fp8": Scheme(format="fp8"),
    "int4": INT4,
    "int4-asymmetric": Scheme(format="int4", group_size=32, symmetric=False),
    "int8": Scheme(format="int8"),
}


def model_of(model_type: str = "llama") -> Any:
    return tiny_model(model_type, intermediate_size=64)


def windows(count: int = 6, length: int = 16) -> TokenWindows:
    tokenizer = load_tokenizer(MODEL)
    text = calibration_text()
    found = token_windows(text, tokenizer, sequence_length=length, num_tokens=count * length)
    # The tiny models know fewer tokens than the tokenizer.
    found.tokens.copy_(tiny_tokens(count, length))
    return found


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: linear.weight.clone() for name, linear in projections_of(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_is_rounded_and_nothing_else_is_changed(family: str) -> None:
    model = model_of(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = weights_of(model)
    weights = quantize_model(model, SCHEMES["int8"])
    assert list(weights) == list(dense)
    for name, tensor in model.state_dict().items():
        projection = name.removesuffix(".weight")
        if projection in weights:
            expected = round_to_nearest(dense[projection].T, SCHEMES["int8"]).dequantize().T
            assert torch.equal(tensor, expected)
        else:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_gptq_observes_inputs_that_come_from_what_is_quantized_already(batch_size: int) -> None:
    model = model_of()
    name = "model.layers.1.mlp.down_proj"
    dense = weights_of(model)[name].T.contiguous()
    tokens = windows()
    weights = quantize_model(model, INT4, tokens, batch_size=batch_size)
    moments = SecondMoments(64, "cpu")
    down = model.get_submodule(name)
    handle = down.register_forward_pre_hook(lambda _module, args: moments.add(args[0]))
    for batch in tokens.tokens.split(batch_size):
        logits_of(model, batch)
    handle.remove()
    expected = quantize_by_moments(dense, moments, INT4)
    assert torch.equal(weights[name].codes, expected.codes)


def test_gptq_runs_each_block_once_to_its_end() -> None:
    model = model_of()
    ends = []
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    down.register_forward_hook(lambda *_: ends.append(1))
    quantize_model(model, INT4, windows(3))
    assert len(ends) == 3


def test_gptq_leaves_no_hooks() -> None:
    model = model_of()
    quantize_model(model, INT4, windows(2))
    assert not any(linear._forward_pre_hooks for linear in projections_of(model).values())


def test_progress_is_shown_block_by_block() -> None:
    shown = []

    def progress(items: list[Any], description: str) -> Iterator[Any]:
        shown.append((len(items), description))
        return iter(items)

    quantize_model(model_of(), INT4, progress=progress)
    assert shown == [(2, "quantize")]


@pytest.mark.slow
def test_gptq_stays_a_quarter_nearer_to_the_dense_model_on_held_out_text_than_rounding() -> None:
    tokenizer = load_tokenizer(MODEL)
    calibration = token_windows(calibration_text(), tokenizer, sequence_length=512, num_tokens=8192)
    held_out = token_windows(held_out_text(), tokenizer, sequence_length=256, num_tokens=4096)
    dense = load_model(MODEL, dtype="float32", device="cpu")

    def divergence(*windows: TokenWindows) -> float:
        model = load_model(MODEL, dtype="float32", device="cpu")
        quantize_model(model, INT4, *windows, batch_size=8)
        return compare(model, held_out, [None], reference=dense).sparse[0].kl

    # The likelihood of so short a text falls and rises by chance; divergence sees every token.
    assert 0 < divergence(calibration) < 0.75 * divergence()


def saved(
    folder: Path, scheme: Scheme = INT4, model: Any = None, **options
) -> tuple[Any, dict[str, QuantizedWeight]]:
    model = model or model_of()
    weights = quantize_model(model, scheme)
    save_quantized(folder, model, load_tokenizer(MODEL), weights, scheme, **options)
    return model, weights


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_computes_the_same_logits_from_the_written_folder(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    model, _ = saved(tmp_path / "model", SCHEMES[name])
    # compressed-tensors 0.20 lays out no room for packed zeros unless weights become floats.
    as_floats = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    opened, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        output_loading_info=True,
        **(as_floats if name == "int4-asymmetric" else {}),
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = tiny_tokens(2, 16)
    assert torch.equal(logits_of(opened, tokens), logits_of(model, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_model_of_every_family_is_read_back_bit_by_bit(
    family: str, tmp_path: Path
) -> None:
    _, weights = saved(tmp_path / "model", model=model_of(family))
    checkpoint = QuantizedCheckpoint(tmp_path / "model")
    assert sorted(weights) == checkpoint.names
    for name, weight in checkpoint:
        assert torch.equal(weight.codes, weights[name].codes)
        assert torch.equal(weight.scales, weights[name].scales)


def test_the_folder_tells_how_it_was_made(tmp_path: Path) -> None:
    model, tokens = model_of(), windows(2)
    weights = quantize_model(model, INT4, tokens)
    folder = tmp_path / "model"
    save_quantized(folder, model, load_tokenizer(MODEL), weights, INT4, tokens=tokens)
    record = read_json(folder / "quantization.json")
    assert (record["kind"], record["method"]) == ("quantization", "gptq")
    assert record["text"]["num_tokens"] == 32
    assert load_tokenizer(str(folder)).eos_token == load_tokenizer(MODEL).eos_token


def test_others_may_read_the_weights_as_they_may_read_the_configuration(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    modes = {stat.S_IMODE(os.stat(path).st_mode) for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


def test_an_existing_folder_is_replaced_only_by_force(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    with pytest.raises(UserError, match="already exists"):
        saved(tmp_path / "model", SCHEMES["int8"])
    saved(tmp_path / "model", SCHEMES["int8"], force=True)
    assert all(weight.format == "int8" for _, weight in QuantizedCheckpoint(tmp_path / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_force_does_not_delete_what_was_not_written_here(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        saved(tmp_path / "model", force=True)
    assert (tmp_path / "model" / "thesis.txt").read_text() == "years of work"


def test_a_failing_write_leaves_the_old_folder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weights = saved(tmp_path / "model")

    def fail(*args) -> Never:
        raise KeyboardInterrupt

    monkeypatch.setattr(compression, "compressed_tensors", fail)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "model", SCHEMES["int8"], force=True)
    checkpoint = QuantizedCheckpoint(tmp_path / "model")
    assert len(dict(checkpoint)) == len(weights)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_sparse_model_is_refused() -> None:
    model = model_of()
    sparsify(model, plan_for(model, 0.1))
    with pytest.raises(UserError, match="densify"):
        quantize_model(model, INT4)


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "model")
    for quantized in (model, load_model(str(tmp_path / "model"), device="cpu")):
        with pytest.raises(UserError, match="quantized already"):
            quantize_model(quantized, INT4)


def test_a_model_that_transformers_quantized_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    saved(tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="Give its folder"):
        quantize_model(opened, INT4)


def test_a_quantized_model_knows_its_format() -> None:
    model = model_of()
    assert weight_format_of(model) == "float"
    quantize_model(model, INT4)
    assert weight_format_of(model) == "int4"


def test_a_rounded_head_has_the_values_of_the_engine_and_leaves_the_embedding() -> None:
    model = load_model(MODEL, dtype="float32", device="cpu")
    dense = model.lm_head.weight.clone()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    quantize_head(model)
    expected = round_to_nearest(dense.T.contiguous(), Scheme(format="int8")).dequantize().T
    assert torch.equal(model.lm_head.weight, expected)
    assert torch.equal(model.model.embed_tokens.weight, dense)


@pytest.mark.parametrize(
    ("intermediate_size", "cure"),
    [
        pytest.param(96, "group size of 32", id="smaller"),
        pytest.param(40, "int8 or fp8", id="none"),
    ],
)
def test_groups_that_do_not_divide_a_projection_are_refused_with_a_cure(
    intermediate_size: int, cure: str
) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=intermediate_size)
    dense = weights_of(model)
    with pytest.raises(UserError, match=rf"{intermediate_size} inputs of .*down_proj.*{cure}"):
        quantize_model(model, Scheme(format="int4", group_size=64))
    assert all(torch.equal(now, dense[name]) for name, now in weights_of(model).items())
