import pytest
import torch
from torch import Tensor, nn

from teal.foundation.errors import UserError
from teal.linear import SparseLinear, first_sparse
from teal.methods import MaskRule
from teal.models.families import FAMILIES, identity_of, projections_of
from teal.plan import PlannedProjection
from teal.sparsification import densify, measure_sparsity, sparse_linears, sparsify
from tests.helpers import (
    differing,
    logits_of,
    padding_of,
    plan_for,
    plan_of,
    tiny_model,
    tiny_tokens,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
LENGTH = 24
# Drops about a third of a tiny model's activations.
THRESHOLD = 0.4


def storage_of(model: nn.Module) -> dict[str, tuple[torch.Size, int]]:
    return {name: (tensor.shape, tensor.data_ptr()) for name, tensor in model.state_dict().items()}


@every_family
@pytest.mark.parametrize("threshold", [0.0, None], ids=["threshold 0", "no rule"])
def test_threshold_zero_leaves_logits_bit_for_bit(family: str, threshold: float | None) -> None:
    model, tokens = tiny_model(family), tiny_tokens(2, LENGTH)
    dense = logits_of(model, tokens)
    sparsify(model, plan_for(model, threshold), sparse_from=0.0)
    assert torch.equal(logits_of(model, tokens), dense)


@every_family
def test_sparsify_then_densify_restores_modules_and_logits(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens(1, LENGTH)
    dense, modules = logits_of(model, tokens), dict(model.named_modules())
    assert sparsify(model, plan_for(model, THRESHOLD), sparse_from=0.5) is model
    assert sparse_linears(model).keys() == plan_for(tiny_model(family), None).projections.keys()
    assert densify(model) is model
    assert list(model.named_modules()) == list(modules.items())
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert torch.equal(logits_of(model, tokens), dense)


@every_family
def test_parameters_keep_names_shapes_and_storage(family: str) -> None:
    model = tiny_model(family)
    storage, parameters = storage_of(model), list(model.named_parameters())
    sparsify(model, plan_for(model, THRESHOLD))
    assert list(storage_of(model).items()) == list(storage.items())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in parameters]
    assert all(
        now is before for now, (_, before) in zip(model.parameters(), parameters, strict=True)
    )


@every_family
def test_every_projection_takes_part(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens(1, LENGTH)
    dense, identity = logits_of(model, tokens), identity_of(model)
    planned = PlannedProjection(target_sparsity=0.5, rule=MaskRule(threshold=THRESHOLD))
    for name in identity.shapes:
        sparsify(model, plan_of(identity, {name: planned}), sparse_from=0.0)
        assert list(sparse_linears(model)) == [name]
        assert differing(logits_of(model, tokens), dense).any(), name


def test_second_plan_takes_the_place_of_the_first() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, LENGTH)
    modules = projections_of(model)
    first, second = plan_for(model, THRESHOLD), plan_for(model, 2 * THRESHOLD)
    sparsify(model, second, sparse_from=0.0)
    expected = logits_of(model, tokens)
    sparsify(model, first, sparse_from=0.5)
    sparsify(model, second, sparse_from=0.0)
    assert torch.equal(logits_of(model, tokens), expected)
    assert projections_of(densify(model)) == modules


def test_densify_leaves_a_dense_model_alone() -> None:
    model = tiny_model("llama")
    modules = list(model.named_modules())
    densify(model)
    assert list(model.named_modules()) == modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sparse_model_runs_on_every_device_in_every_dtype(
    dtype: torch.dtype, device: torch.device
) -> None:
    model, tokens = tiny_model("llama").to(device, dtype), tiny_tokens(1, LENGTH).to(device)
    dense = logits_of(model, tokens)
    score_scale = torch.ones(identity_of(model).shapes["model.layers.0.mlp.down_proj"][0])
    rule = MaskRule(threshold=THRESHOLD / 8, score_scale=score_scale)
    planned = {"model.layers.0.mlp.down_proj": PlannedProjection(target_sparsity=0.5, rule=rule)}
    sparsify(model, plan_of(identity_of(model), planned), sparse_from=0.5)
    sparse = logits_of(model, tokens)
    assert sparse.dtype == dtype
    assert torch.equal(sparse[:, : LENGTH // 2], dense[:, : LENGTH // 2])
    assert differing(sparse, dense)[:, LENGTH // 2 :].any()


@pytest.mark.parametrize("with_padding", [True, False], ids=["padding", "no padding"])
@pytest.mark.parametrize("sparse_from", [0.0, 0.5])
def test_measured_sparsity_is_the_share_dropped_of_sparse_tokens(
    sparse_from: float, with_padding: bool
) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, LENGTH)
    lengths = [LENGTH, 17, 10] if with_padding and sparse_from else [LENGTH] * 3
    padding = padding_of(lengths, LENGTH, "left")
    sparsify(model, plan_for(model, THRESHOLD), sparse_from=sparse_from)
    inputs = recorded_inputs(model)
    with measure_sparsity(model) as meters:
        logits_of(model, tokens, attention_mask=padding)
    sparse = torch.zeros_like(padding, dtype=torch.bool)
    for row, length in enumerate(lengths):
        sparse[row, LENGTH - length + first_sparse(length, sparse_from) :] = True
    assert meters.keys() == inputs.keys()
    for name, x in inputs.items():
        expected = (x[sparse].abs() <= torch.tensor(THRESHOLD)).double().mean().item()
        assert meters[name].sparsity == pytest.approx(expected, abs=1e-12)


def test_meters_go_on_counting_and_are_removed_even_after_an_error() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, LENGTH)
    sparsify(model, plan_for(model, float("inf")), sparse_from=0.0)
    with pytest.raises(RuntimeError), measure_sparsity(model) as meters:
        raise RuntimeError
    assert all(linear.meter is None for linear in sparse_linears(model).values())
    assert all(meter.sparsity == 0.0 for meter in meters.values())
    with measure_sparsity(model, meters) as same:
        logits_of(model, tokens)
    assert same is meters
    assert all(meter.sparsity == 1.0 for meter in meters.values())


@pytest.mark.parametrize(
    ("other", "mismatch"),
    [
        (tiny_model("mistral"), "model type 'mistral' here, 'llama' in the model"),
        (
            tiny_model("llama", num_hidden_layers=3),
            r"model\.layers\.2\.self_attn\.q_proj is 32→32 here, absent in the model",
        ),
        (
            tiny_model("llama", num_hidden_layers=1),
            r"model\.layers\.1\.self_attn\.q_proj is absent here, 32→32 in the model",
        ),
        (
            tiny_model("llama", num_key_value_heads=1),
            r"model\.layers\.0\.self_attn\.k_proj is 32→8 here, 32→16 in the model",
        ),
    ],
    ids=["type", "missing projection", "further projection", "shape"],
)
def test_plan_of_another_model_is_refused_with_the_first_mismatch(
    other: nn.Module, mismatch: str
) -> None:
    model = tiny_model("llama")
    modules = list(model.named_modules())
    with pytest.raises(UserError, match=f"belongs to another model: {mismatch}. Use the model"):
        sparsify(model, plan_for(other, THRESHOLD))
    assert list(model.named_modules()) == modules


def recorded_inputs(model: nn.Module) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}

    def record(module: SparseLinear, args: tuple[Tensor]) -> None:
        inputs[names[module]] = args[0]

    names = {linear: name for name, linear in sparse_linears(model).items()}
    for linear in names:
        linear.register_forward_pre_hook(record)
    return inputs
