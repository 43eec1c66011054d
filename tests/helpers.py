"""What tests share: the table of tolerances, tiny models of every family, plans and tokens."""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from teal.foundation.identity import ModelIdentity
from teal.foundation.provenance import TextProvenance
from teal.methods import MaskRule
from teal.models.families import FAMILIES, identity_of
from teal.plan import PlannedProjection, SparsityPlan

# How far results may be apart that are equal on paper; what is not listed has to be bit-equal.
TOLERANCES: Mapping[str, float] = {
    # Effective against target sparsity on the calibration text itself.
    "sparsity": 1e-3,
    # Perplexity against figures that somebody else measured on the same text and models.
    "perplexity": 0.02,
    # ... plus this much per nat of KL divergence from dense.
    "perplexity_per_kl": 0.01,
    # Logits of float32 models whose attention sums in another order, such as with padding.
    "logits": 1e-5,
    # A product may err this many times as much as torch's in the same dtype ...
    "product_factor": 2.0,
    # ... plus this fraction of the dtype's eps.
    "product_eps": 0.125,
}

VOCABULARY = 97

ENGINE_FAMILIES = [name for name, family in FAMILIES.items() if family.form is not None]

_FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir")

_SHARED: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {"head_dim": 8, **_ALTERNATING},
    "gemma3_text": {"head_dim": 8, **_ALTERNATING},
    "mistral": {"sliding_window": 5},
    "phi3": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, **_ALTERNATING},
    "qwen3": {"head_dim": 8, "use_sliding_window": True, **_ALTERNATING},
}


def tiny_model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """Build a random float32 model of two layers in evaluation mode.

    The weights are large enough that every token, position and projection moves the logits.

    Args:
        model_type: One of `teal.models.families.FAMILIES`.
        seed: The same seed gives the same weights.
        changes: Fields of the configuration to set otherwise.
    """
    fields = {**_SHARED, **_OWN.get(model_type, {}), **changes}
    # SDPA has no soft cap of scores, and older releases of transformers take it for gemma2 anyway.
    attention = "eager" if model_type == "gemma2" else None
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data += 0.1 * noise
        else:
            parameter.data = noise * parameter.shape[-1] ** -0.5
    return model.eval()


def tiny_tokens(windows: int, length: int, *, seed: int = 0) -> Tensor:
    """Draw ordinary token ids, (windows, length), int64: none pads, begins or ends a text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (windows, length), generator=generator)


def padding_of(lengths: Sequence[int], length: int, side: str) -> Tensor:
    """Return 1 for a token, 0 for padding on the "left" or "right", (len(lengths), length)."""
    sizes = torch.tensor(lengths)[:, None]
    starts = length - sizes if side == "left" else torch.zeros_like(sizes)
    positions = torch.arange(length)
    return ((positions >= starts) & (positions < starts + sizes)).long()


def plan_for(model: nn.Module, threshold: float | None) -> SparsityPlan:
    """Plan one threshold for every projection of `model`, or none at all."""
    rule = None if threshold is None else MaskRule(threshold=threshold)
    identity = identity_of(model)
    return plan_of(
        identity,
        {name: PlannedProjection(target_sparsity=0.5, rule=rule) for name in identity.shapes},
    )


def plan_of(
    identity: ModelIdentity,
    projections: Mapping[str, PlannedProjection],
    *,
    target_sparsity: float = 0.5,
) -> SparsityPlan:
    """Fill in everything about a plan that its projections do not say."""
    return SparsityPlan(
        model=identity,
        projections=projections,
        method="teal",
        strategy="uniform",
        target_sparsity=target_sparsity,
        calibration=TextProvenance(
            source="text",
            sha256="0" * 64,
            offset=0,
            num_tokens=64,
            sequence_length=32,
            fingerprints=torch.tensor([-3, 5], dtype=torch.int64),
        ),
        dtype="float32",
        library_version="0",
    )


def logits_of(model: Any, tokens: Tensor, **arguments: Any) -> Tensor:
    """Run one forward pass without a cache: logits, (windows, length, vocabulary)."""
    with torch.no_grad():
        logits: Tensor = model(tokens, use_cache=False, **arguments).logits
    return logits


def differing(one: Tensor, other: Tensor) -> Tensor:
    """Tell at which tokens logits differ at all, (windows, length)."""
    return (one != other).any(-1)


def relative_error(product: Tensor, exact: Tensor) -> float:
    """Return rms(product - exact) / rms(exact), summed in float64."""
    product, exact = product.detach().double(), exact.detach().double()
    return float((product - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def assert_as_precise_as_torch(product: Tensor, by_torch: Tensor, exact: Tensor) -> None:
    """Require that `product` errs about as little as torch's product in the same dtype."""
    allowed = TOLERANCES["product_factor"] * relative_error(by_torch, exact)
    allowed += TOLERANCES["product_eps"] * torch.finfo(product.dtype).eps
    assert product.dtype == by_torch.dtype
    assert relative_error(product, exact) <= allowed


def kill_before_file_event(moment: int, action: Callable[[], object]) -> bool:
    """Run `action` in another process and kill that before it opens, renames or removes a file.

    Args:
        moment: How many such events the process lives to see.
        action: What to do there.

    Returns:
        Whether it was killed; if not, it came to its end before.
    """
    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(_Killer(moment))
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


class _Killer:
    def __init__(self, moment: int) -> None:
        self.left = moment

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS:
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
