from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from teal.engine.layers import LayerCalls, dense_calls, run_layer
from teal.engine.weights.matrix import KEEP_ALL
from teal.engine.weights.transformers import from_model
from teal.foundation.errors import UserError
from teal.kernels.ops import attend
from teal.kernels.reference.matmul import keep_mask
from teal.methods import MaskRule
from teal.models.architectures import architecture_of
from teal.models.families import blocks_of
from tests.engine.decoding import (
    LENGTH,
    assert_close,
    by_transformers,
    cache_for,
    decoded,
    decoder_of,
)
from tests.helpers import (
    ENGINE_FAMILIES,
    TOLERANCES,
    VOCABULARY,
    logits_of,
    plan_for,
    tiny_model,
    tiny_tokens,
)

every_family = pytest.mark.parametrize("family", ENGINE_FAMILIES)

ATTENTION = "model.layers.1.self_attn"
MLP = "model.layers.1.mlp"


def calls_with(rules: dict[str, MaskRule | None], family: str = "llama") -> LayerCalls:
    model = tiny_model(family, **({"attention_bias": True} if family == "llama" else {}))
    architecture = architecture_of(model.config)
    dense = dense_calls(architecture, 1, from_model(model).layers[1])
    return dense.with_rules(architecture.inputs(1), rules, torch.float32)


def rule(threshold: float, **vectors: Tensor) -> MaskRule:
    return MaskRule(threshold=threshold, **vectors)


def thresholds(calls: LayerCalls) -> list[tuple[float, ...]]:
    return [call.thresholds for call in calls.projections]


def test_layer_without_rules_is_dense() -> None:
    kept = (KEEP_ALL,)
    assert thresholds(calls_with({})) == [kept * 3, kept, kept * 2, kept]


def test_projection_without_a_rule_stays_dense_beside_one_with_a_rule() -> None:
    calls = calls_with({f"{ATTENTION}.k_proj": rule(0.5), f"{MLP}.gate_proj": None})
    kept = (KEEP_ALL,)
    assert thresholds(calls) == [(KEEP_ALL, 0.5, KEEP_ALL), kept, kept * 2, kept]


def test_rules_reach_the_products_of_their_projections() -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    rules = {f"{ATTENTION}.{name}": rule(i / 8) for i, name in enumerate(names)}
    names = ("gate_proj", "up_proj", "down_proj")
    rules |= {f"{MLP}.{name}": rule(i / 2) for i, name in enumerate(names)}
    expected = [(0.0, 0.125, 0.25), (0.375,), (0.0, 0.5), (1.0,)]
    assert thresholds(calls_with(rules)) == expected


def test_rule_of_a_fused_projection_applies_to_all_its_parts() -> None:
    score_scale = torch.rand(32)
    rules = {
        f"{ATTENTION}.qkv_proj": rule(0.5),
        f"{MLP}.gate_up_proj": rule(0.25, score_scale=score_scale),
    }
    calls = calls_with(rules, "phi3")
    assert thresholds(calls) == [(0.5,) * 3, (KEEP_ALL,), (0.25,) * 2, (KEEP_ALL,)]
    scales = calls.gate_up.score_scale
    assert scales is not None
    assert torch.equal(scales, score_scale.expand(2, -1))


def test_projection_without_a_scale_weighs_every_channel_equally() -> None:
    score_scale = torch.rand(32)
    rules = {
        f"{ATTENTION}.q_proj": rule(0.5, score_scale=score_scale),
        f"{ATTENTION}.v_proj": rule(0.5),
    }
    scales = calls_with(rules).qkv.score_scale
    assert scales is not None
    assert torch.equal(scales, torch.stack([score_scale, torch.ones(32), torch.ones(32)]))


def test_shift_is_folded_into_the_bias() -> None:
    shift = torch.rand(32)
    calls = calls_with({f"{ATTENTION}.o_proj": rule(0.5, shift=shift)})
    weight, found, bias = calls.o.weight, calls.o.shift, calls.o.bias
    dense = calls_with({}).o.bias
    assert dense is not None
    assert bias is not None
    assert found is not None
    assert isinstance(weight, Tensor)
    assert torch.equal(found, shift)
    torch.testing.assert_close(bias, dense + shift @ weight)


@pytest.mark.parametrize(
    "other", [{}, {"shift": torch.zeros(32)}], ids=["no shift", "another shift"]
)
def test_different_shifts_of_one_input_are_refused(other: dict[str, Any]) -> None:
    rules = {
        f"{MLP}.gate_proj": rule(0.5, shift=torch.ones(32)),
        f"{MLP}.up_proj": rule(1, **other),
    }
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp_input have different .* one shift"):
        calls_with(rules)


def test_tuning_reaches_every_projection() -> None:
    model = tiny_model("llama")
    architecture = architecture_of(model.config)
    calls = dense_calls(architecture, 1, from_model(model).layers[1], tuning="tables")
    rules = {f"{MLP}.down_proj": rule(0.5)}
    for given in (calls, calls.with_rules(architecture.inputs(1), rules, torch.float32)):
        assert {call.tuning for call in given.projections} == {"tables"}


def test_dense_calls_are_left_as_they_were() -> None:
    model = tiny_model("llama")
    architecture = architecture_of(model.config)
    dense = dense_calls(architecture, 1, from_model(model).layers[1])
    dense.with_rules(architecture.inputs(1), {f"{MLP}.down_proj": rule(0.5)}, torch.float32)
    assert dense.down.thresholds == (KEEP_ALL,)


@pytest.mark.parametrize("vectors", ["score_scale", "shift", "both"])
def test_rules_with_vectors_give_the_logits_of_transformers(vectors: str) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, LENGTH)[0]
    plan = plan_for(model, 0.3)
    for name, planned in plan.projections.items():
        size = plan.model.shapes[name][0]
        own = {
            "score_scale": torch.linspace(0.5, 2, size),
            "shift": torch.linspace(-0.5, 0.5, size),
        }
        if vectors != "both":
            own = {vectors: own[vectors]}
        object.__setattr__(planned, "rule", MaskRule(threshold=0.3, **own))
    expected = by_transformers(model, tokens, plan)
    assert_close(decoded(decoder_of(model, plan), tokens), expected)


@every_family
def test_observer_sees_the_inputs_of_the_projections(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens(1, LENGTH)[0]
    inputs = {name: names[0] for block in blocks_of(model) for name, names in block.inputs.items()}
    expected: dict[str, Tensor] = {}
    for name, projection in inputs.items():
        model.get_submodule(projection).register_forward_pre_hook(
            lambda module, args, name=name: expected.update({name: args[0][0]})
        )
    logits_of(model, tokens[None])
    decoder = decoder_of(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in inputs}
    decoder.observer = lambda name, x: seen[name].append(x.clone())
    decoded(decoder, tokens)
    assert list(seen) == list(expected)
    for name, activations in seen.items():
        # Those of the MLP are larger than logits.
        tolerance = TOLERANCES["logits"]
        torch.testing.assert_close(
            torch.cat(activations), expected[name], rtol=tolerance, atol=tolerance
        )


def test_observer_measures_the_sparsity_of_a_step() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, LENGTH)[0]
    decoder = decoder_of(model, plan_for(model, 0.4))
    kept: list[float] = []
    decoder.observer = lambda name, x: kept.append(float(keep_mask(x, 0.4).float().mean()))
    cache = cache_for(decoder)
    decoder.step(tokens[:1], cache)
    assert len(kept) == 8
    assert 0.3 < sum(kept) / len(kept) < 0.9


class Recorder(TorchDispatchMode):
    """Lists the operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        self.operations.append(operation._opname)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen2", "qwen3"])
@pytest.mark.parametrize("threshold", [None, 0.4], ids=["dense", "sparse"])
def test_step_of_a_pre_norm_layer_is_five_operations(family: str, threshold: float | None) -> None:
    model = tiny_model(family)
    decoder = decoder_of(model, plan_for(model, threshold))
    cache = cache_for(decoder)
    place = (cache.keys[0], cache.values[0], cache.positions, cache.cosines[0], cache.sines[0])
    hidden = torch.ones(1, 32)
    with torch.no_grad(), Recorder() as recorder:
        run_layer(hidden, decoder.layers[0], attend, place, None)
    expected = ["sparse_linear", "attend", "sparse_linear", "sparse_glu", "sparse_linear"]
    assert recorder.operations == expected


@every_family
@pytest.mark.parametrize("batch_size", [1, 3])
def test_step_depends_on_no_values_of_tensors(family: str, batch_size: int) -> None:
    model = tiny_model(family)
    decoder = decoder_of(model, plan_for(model, 0.4))
    cache = cache_for(decoder, batch_size=batch_size)
    # A fake tensor has no values: whoever asks for one raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = decoder.step(torch.ones(batch_size, dtype=torch.int64), cache)
    assert logits.shape == (batch_size, VOCABULARY)
    assert logits.dtype == torch.float32
