import pytest
import torch
from torch import Tensor

from teal.engine.projection import ProjectionCall
from teal.engine.weights.matrix import KEEP_ALL
from teal.foundation.errors import UserError
from teal.methods import MaskRule
from teal.quantization import Scheme, round_to_nearest
from tests.helpers import relative_error

SCHEMES = [Scheme(format="int8"), Scheme(format="fp8"), Scheme(format="int4", group_size=32)]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.format)

# Rounding error of sums in float32.
TINY = 2e-6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(**operands: object) -> ProjectionCall:
    """Two projections of 32 and 64 columns."""
    given = {
        "weight": draw(70, 96),
        "thresholds": (KEEP_ALL,) * 2,
        "output_sizes": (32, 64),
        **operands,
    }
    return ProjectionCall(**given)  # type: ignore[arg-type]


@schemes
@pytest.mark.parametrize("activation", [None, "silu"], ids=["linear", "glu"])
def test_products_with_quantized_weights_equal_those_with_their_values(
    scheme: Scheme, activation: str | None
) -> None:
    weight = round_to_nearest(draw(70, 96), scheme)
    x, residual = draw(2, 70, seed=1), None if activation else draw(2, 96, seed=2)
    quantized, floats = (
        ProjectionCall(
            weight=matrix,
            thresholds=(0.3, 0.5 if activation else KEEP_ALL),
            output_sizes=(48, 48) if activation else (32, 64),
            activation=activation,
            norm_weight=1 + draw(70, seed=3),
            eps=1e-5,
            score_scale=draw(2, 70, seed=4).abs(),
            shift=draw(70, seed=5),
            bias=draw(96, seed=6),
        )
        for matrix in (weight, weight.dequantize())
    )
    assert relative_error(quantized(x, residual), floats(x, residual)) < TINY


def test_residual_and_bias_are_added_to_the_product() -> None:
    x, residual, bias = draw(2, 70, seed=1), draw(2, 96, seed=2), draw(96, seed=3)
    call = dense(bias=bias)
    assert relative_error(call(x, residual), x @ draw(70, 96) + bias + residual) < TINY


def test_rules_give_each_projection_its_threshold() -> None:
    call = dense().with_rules([MaskRule(threshold=0.5), None], "x", torch.float32)
    assert call.thresholds == (0.5, KEEP_ALL)
    x = draw(1, 70, seed=1)
    kept = torch.where(x.abs() > 0.5, x, 0.0)
    expected = torch.cat([kept @ draw(70, 96)[:, :32], x @ draw(70, 96)[:, 32:]], dim=1)
    assert relative_error(call(x), expected) < TINY


def test_rules_leave_the_dense_call_as_it_was() -> None:
    call = dense()
    assert not call.with_rules([MaskRule(threshold=0.5)] * 2, "x", torch.float32).is_dense
    assert call.is_dense
    assert call.with_rules([None, None], "x", torch.float32) is call


def test_rule_of_a_fused_projection_applies_to_all_its_parts() -> None:
    rule = MaskRule(threshold=0.5, score_scale=draw(70).abs())
    call = dense().with_rules([rule], "x", torch.float32)
    assert call.thresholds == (0.5, 0.5)
    assert call.score_scale is not None
    assert rule.score_scale is not None
    assert torch.equal(call.score_scale, rule.score_scale.expand(2, -1))


def test_projection_without_a_scale_weighs_every_channel_equally() -> None:
    scale = draw(70).abs()
    rules = [MaskRule(threshold=0.5), MaskRule(threshold=0.5, score_scale=scale)]
    call = dense().with_rules(rules, "x", torch.float32)
    assert call.score_scale is not None
    assert torch.equal(call.score_scale, torch.stack([torch.ones(70), scale]))


@pytest.mark.parametrize("bias", [None, draw(96, seed=2)], ids=["no bias", "bias"])
def test_shift_is_folded_into_the_bias(bias: Tensor | None) -> None:
    rule = MaskRule(threshold=0.5, shift=draw(70, seed=1))
    call = dense(bias=bias).with_rules([rule, rule], "x", torch.float32)
    assert rule.shift is not None
    assert call.shift is not None
    assert call.bias is not None
    assert torch.equal(call.shift, rule.shift)
    expected = rule.shift @ draw(70, 96) + (0.0 if bias is None else bias)
    torch.testing.assert_close(call.bias, expected)


def test_folded_bias_has_the_dtype_of_the_activations() -> None:
    rule = MaskRule(threshold=0.5, shift=draw(70, seed=1))
    call = dense().with_rules([rule, rule], "x", torch.bfloat16)
    assert call.bias is not None
    assert call.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("other", [None, torch.zeros(70)], ids=["no shift", "another shift"])
def test_different_shifts_of_one_input_are_refused(other: Tensor | None) -> None:
    rules = [MaskRule(threshold=0.5, shift=torch.ones(70)), MaskRule(threshold=1.0, shift=other)]
    with pytest.raises(UserError, match=r"read the_input have different .* one shift"):
        dense().with_rules(rules, "the_input", torch.float32)
