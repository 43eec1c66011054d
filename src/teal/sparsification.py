"""Making a model sparse and dense again, in place."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from teal.foundation.errors import UserError
from teal.linear import DECODE_ROWS, SparseLinear, SparsityMeter, TokenSelection
from teal.methods import MaskRule
from teal.models.families import identity_of, projections_of
from teal.models.weight_format import warn_of_format, weight_format_of
from teal.plan import SparsityPlan

_HOOK = "_teal_hook"


def sparsify(model: nn.Module, plan: SparsityPlan, *, sparse_from: float = 1.0) -> nn.Module:
    """Make `model` sparse in place and return it; `densify` undoes it.

    Forward passes of up to 8 token rows (decoding) are always sparse. Parameters keep their names,
    shapes and storage.

    Args:
        model: A Hugging Face causal language model of a supported family, dense or sparse.
        plan: Sparsity plan of this model.
        sparse_from: In a forward pass of more than 8 token rows (prefill), the tokens at positions
            ≥ `sparse_from` · length of each sequence are sparse: 1 keeps prefill dense, 0.5 is the
            paper's evaluation protocol, 0 is every token.

    Returns:
        `model`.

    Raises:
        UserError: The plan belongs to another model, `sparse_from` is outside [0, 1], or
            transformers opened the model quantized.
    """
    warn_of_format(plan.weight_format, weight_format_of(model))
    return insert_plan(model, plan, sparse_from=sparse_from)


def insert_plan(model: nn.Module, plan: SparsityPlan, *, sparse_from: float) -> nn.Module:
    """Make `model` sparse in place as `sparsify` does, without a warning about weight formats.

    Args:
        model: A Hugging Face causal language model of a supported family, dense or sparse.
        plan: Sparsity plan of this model.
        sparse_from: See `sparsify`.

    Returns:
        `model`.

    Raises:
        UserError: The plan belongs to another model, or `sparse_from` is outside [0, 1].
    """
    if not 0.0 <= sparse_from <= 1.0:
        raise UserError(f"sparse_from {sparse_from!r} is outside [0, 1]. Give 1 for dense prefill.")
    densify(model)
    plan.model.require(identity_of(model), "plan")
    rules = {name: planned.rule for name, planned in plan.projections.items() if planned.rule}
    selection = TokenSelection(sparse_from)
    insert_sparse_linears(model, rules, selection)
    _follow_padding(model, selection)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Make `model` dense in place, restoring its original modules, and return it."""
    for name, sparse in sparse_linears(model).items():
        model.set_submodule(name, sparse.replaced)
    for handle in model.__dict__.pop(_HOOK, ()):
        handle.remove()
    return model


def sparse_linears(model: nn.Module) -> dict[str, SparseLinear]:
    """Return the sparse projections of `model` by dotted module name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)
    }


def insert_sparse_linears(
    model: nn.Module, rules: Mapping[str, MaskRule | None], selection: TokenSelection
) -> dict[str, SparseLinear]:
    """Replace the named projections of `model` by sparse linears, in place; `densify` undoes it.

    Args:
        model: A dense model.
        rules: Mask rule of each projection, by dotted module name.
        selection: Selection of sparse tokens, shared by the new modules.

    Returns:
        The new modules by name.
    """
    projections = projections_of(model)
    linears = {
        name: SparseLinear(projections[name], rule, selection) for name, rule in rules.items()
    }
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    return linears


@contextmanager
def measure_sparsity(
    model: nn.Module, meters: dict[str, SparsityMeter] | None = None
) -> Iterator[dict[str, SparsityMeter]]:
    """Count dropped activations per projection inside the with statement.

    Only sparse tokens are counted.

    Args:
        model: A sparse model.
        meters: Meters by projection to continue with; missing ones are added.

    Yields:
        A meter for each sparse projection by name, readable after the with statement too.
    """
    linears = sparse_linears(model)
    meters = {} if meters is None else meters
    try:
        for name, linear in linears.items():
            linear.meter = meters.setdefault(name, SparsityMeter())
        yield meters
    finally:
        for linear in linears.values():
            linear.meter = None


def sparse_tokens(padding: Tensor, sparse_from: float) -> Tensor:
    """Return the sparse tokens of padded sequences.

    Args:
        padding: 1 for a token, 0 for padding on either side, (batch, tokens).
        sparse_from: Fraction of each sequence that stays dense.

    Returns:
        Mask, (batch, tokens), bool, True for sparse tokens; padding is never sparse.
    """
    real = padding.bool()
    length = real.sum(-1, keepdim=True)
    position = real.cumsum(-1) - 1
    # In float64, to agree with `first_sparse`.
    return real & (position >= torch.ceil(sparse_from * length.double()))


def _follow_padding(model: nn.Module, selection: TokenSelection) -> None:
    """Set the mask of `selection` at each call of `model` with padded sequences."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not 0.0 < selection.sparse_from < 1.0:
            return
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        if tokens is None or tokens.shape[:2].numel() <= DECODE_ROWS:
            return
        _refuse_continuation(given.get("past_key_values"), selection.sparse_from)
        padding = given.get("attention_mask")
        if padding is not None and padding.dim() == 2:
            selection.mask = sparse_tokens(padding, selection.sparse_from)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        selection.mask = None

    handles = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    )
    model.__dict__[_HOOK] = handles


def _refuse_continuation(cache: Any, sparse_from: float) -> None:
    cached = cache.get_seq_length() if cache is not None else 0
    if cached:
        raise UserError(
            f"sparse_from={sparse_from} needs each sequence in one forward pass, and this one "
            f"continues a cache of {cached} tokens. Use sparse_from 0 or 1, or one pass."
        )
