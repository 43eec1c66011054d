from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from teal.calibration import CalibrationStats, calibrate
from teal.data import TokenWindows
from teal.foundation.errors import UserError
from teal.models.families import FAMILIES, projections_of
from teal.sparsification import sparsify
from tests.helpers import TOLERANCES, padding_of, plan_for, tiny_model, tiny_tokens


def observed_inputs(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the whole model once and return what every projection received, (rows, in_features)."""
    received = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            received[name] = args[0].detach().flatten(0, -2)

        return hook

    handles = [
        linear.register_forward_pre_hook(hook_for(name))
        for name, linear in projections_of(model).items()
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return received


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_statistics_are_those_of_a_pass_through_the_whole_model(model_type: str) -> None:
    model, tokens = tiny_model(model_type), tiny_tokens(3, 24)
    stats = calibrate(model, tokens, batch_size=2)
    for name, x in observed_inputs(model, tokens).items():
        statistics = stats.of(name)
        torch.testing.assert_close(statistics.mean, x.double().mean(0), atol=1e-5, rtol=1e-4)
        dropped = (x.abs() <= statistics.quantile(0.5)).float().mean().item()
        assert dropped == pytest.approx(0.5, abs=5 * TOLERANCES["sparsity"])
        assert statistics.count == tokens.numel()


def test_padding_is_not_counted() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, 24)
    padding = padding_of([24, 9], 24, "left")
    padded = calibrate(model, tokens, padding=padding)
    whole = calibrate(model, tokens[:1])
    short = calibrate(model, tokens[1:, 15:])
    expected = whole.merge(short)
    for name, statistics in padded.inputs.items():
        assert statistics.count == 33
        assert statistics.histogram.total == expected.inputs[name].histogram.total
        torch.testing.assert_close(
            statistics.second_moment, expected.inputs[name].second_moment, atol=1e-5, rtol=1e-4
        )


def test_two_halves_merge_to_one_pass() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(4, 24)
    merged = calibrate(model, tokens[:2]).merge(calibrate(model, tokens[2:]))
    for name, statistics in calibrate(model, tokens).inputs.items():
        assert torch.equal(statistics.histogram.counts, merged.inputs[name].histogram.counts)
        torch.testing.assert_close(statistics.mean, merged.inputs[name].mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_is_measured_in_itself(dtype: str) -> None:
    stats = calibrate(tiny_model("llama").to(dtype), tiny_tokens(1, 24))
    assert stats.dtype == str(dtype).removeprefix("torch.")


def test_overflow_names_the_projection_and_a_cure() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(torch.inf)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj holds NaN or inf"):
        calibrate(model, tiny_tokens(1, 24))


def test_a_sparse_model_is_refused() -> None:
    model = tiny_model("llama")
    sparsify(model, plan_for(model, 0.1))
    with pytest.raises(UserError, match="densify"):
        calibrate(model, tiny_tokens(1, 24))


def test_tokens_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(UserError, match="windows, sequence_length"):
        calibrate(tiny_model("llama"), torch.arange(9))


def test_model_is_left_as_it_was() -> None:
    model = tiny_model("gemma2")
    modules = dict(model.named_modules())
    stats = calibrate(model, tiny_tokens(1, 24))
    assert isinstance(stats, CalibrationStats)
    assert dict(model.named_modules()) == modules
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_named_windows_leave_their_provenance() -> None:
    tokens = tiny_tokens(2, 24)
    stats = calibrate(tiny_model("llama"), tokens)
    assert (stats.text.num_tokens, stats.text.sequence_length) == (48, 24)
    named = calibrate(tiny_model("llama"), TokenWindows(tokens, stats.text))
    assert named.text is stats.text
