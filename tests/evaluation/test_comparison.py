import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teal.allocation import allocate
from teal.calibration import calibrate
from teal.evaluation import compare, evaluate
from teal.evaluation.scores import log_probabilities
from teal.foundation.errors import UserError
from teal.linear import first_sparse
from teal.models.families import FAMILIES
from teal.models.loading import context_length, load_model, load_tokenizer
from teal.plan import SparsityPlan
from teal.sparsification import densify, sparse_linears, sparsify
from tests.helpers import TOLERANCES, logits_of, plan_for, tiny_model, tiny_tokens

LENGTH = 24


def mean_nll(model: Any, tokens: Tensor, start: int) -> float:
    """Score the tokens predicted from positions ≥ start, the plain way."""
    logits = logits_of(model, tokens)[:, start:-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, start + 1 :].flatten()).item()


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize(("sparse_from", "start"), [(0.0, 0), (0.5, 12), (0.51, 13)])
def test_scores_are_those_of_plain_forward_passes(
    model_type: str, sparse_from: float, start: int
) -> None:
    model, tokens = tiny_model(model_type), tiny_tokens(3, LENGTH)
    plan = plan_for(model, 0.3)
    result = evaluate(model, tokens, plan, sparse_from=sparse_from)
    assert result.dense.nll == pytest.approx(mean_nll(model, tokens, start), rel=1e-5)
    sparsify(model, plan, sparse_from=sparse_from)
    assert result.sparse[0].nll == pytest.approx(mean_nll(model, tokens, start), rel=1e-5)
    assert result.tokens == 3 * (LENGTH - 1 - start)


def test_effective_sparsity_on_the_calibration_text_is_the_target() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(4, LENGTH)
    plan = allocate(calibrate(model, tokens), sparsity=0.5)
    result = evaluate(model, tokens, plan, sparse_from=0.0)
    # Inputs behind a sparse projection are other inputs than the calibrated ones.
    assert result.sparse[0].effective_sparsity == pytest.approx(0.5, abs=0.03)


def test_dense_projections_count_as_zero_sparsity() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, LENGTH)
    plan = plan_for(model, 1e9)
    half = {
        name: planned if "mlp" in name else type(planned)(target_sparsity=0.0, rule=None)
        for name, planned in plan.projections.items()
    }
    mixed = type(plan)(**{**vars(plan), "projections": half})
    result = evaluate(model, tokens, mixed, sparse_from=0.0)
    shares = {name: 1.0 if "mlp" in name else 0.0 for name in half}
    assert result.sparse[0].effective_sparsity == pytest.approx(plan.model.mean_sparsity(shares))


def test_a_plan_that_drops_nothing_agrees_with_dense_exactly() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, LENGTH)
    result = evaluate(model, tokens, plan_for(model, None))
    assert result.sparse[0].nll == result.dense.nll
    assert (result.sparse[0].kl, result.sparse[0].top1_agreement) == (0.0, 1.0)


def test_several_plans_in_one_pass_equal_one_pass_each() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, LENGTH)
    plans = [plan_for(model, 0.1), plan_for(model, 0.5)]
    together = compare(model, tokens, plans)
    for plan, score in zip(plans, together.sparse, strict=True):
        assert evaluate(model, tokens, plan).sparse[0] == score


def test_model_is_dense_afterwards_also_after_an_error() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, LENGTH)
    evaluate(model, tokens, plan_for(model, 0.3))
    assert not sparse_linears(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN"):
        evaluate(model, tokens, plan_for(model, 0.3))
    assert not sparse_linears(densify(model))


def test_json_has_sparse_only_with_a_plan() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, LENGTH)
    dense = evaluate(model, tokens, sparse_from=0.0).to_dict()
    assert set(dense) == {"dense", "tokens", "sparse_from", "sequence_length"}
    assert set(evaluate(model, tokens, plan_for(model, 0.3)).to_dict()) == {*dense, "sparse"}


@pytest.mark.parametrize("sparse_from", [1.0, 0.99, -0.1, 1.5, float("nan")])
def test_a_window_without_sparse_tokens_is_refused(sparse_from: float) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError):
        evaluate(model, tiny_tokens(1, LENGTH), plan_for(model, 0.3), sparse_from=sparse_from)


# Perplexity by target sparsity, from the README beside the data: thresholds from
# tinystories_train_head.txt, 61k tokens of tinystories_val_head.txt. Every sparsity is measured
# with one protocol per model, and every protocol with low and high sparsity.
PUBLISHED: dict[tuple[str, float], dict[float, float]] = {
    ("babyllama361-hf", 0.5): {0.0: 1.867, 0.4: 2.291, 0.65: 26.3},
    ("babyllama361-hf", 0.0): {0.25: 1.984, 0.5: 3.767},
    ("stories260K-hf", 0.5): {0.25: 3.626, 0.5: 6.643},
    ("stories260K-hf", 0.0): {0.0: 3.657, 0.4: 4.515, 0.65: 48.4},
}
# Thresholds are quantiles of some 70k tokens; the whole text moves them by less than rounding.
CALIBRATION_TOKENS = 70_000


def story_windows(path: Path, tokenizer: Any, length: int, count: int | None = None) -> Tensor:
    """Join stories in order, each behind a begin-of-text token and in one paragraph."""
    stories = re.split(r"\n\n?(?=Once upon a time)", path.read_text())[1:]
    ids = []
    for story in stories:
        paragraph = story.strip().replace("\n\n", " ")
        ids += [tokenizer.bos_token_id]
        ids += tokenizer(paragraph, add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(ids[:count])
    return windows[: len(windows) // length * length].view(-1, length)


def published_scores(
    model: Any, held_out: Tensor, plans: Mapping[float, SparsityPlan], sparse_from: float
) -> dict[float, tuple[float, float]]:
    """Return perplexity and KL divergence from dense for each plan, many windows to a pass."""
    start = first_sparse(held_out.shape[1], sparse_from)
    sums: dict[float, Tensor] = dict.fromkeys(plans, torch.zeros(2, dtype=torch.float64))
    for tokens in held_out.split(16):
        targets = tokens[:, start + 1 :]
        dense = log_probabilities(logits_of(densify(model), tokens)[:, start:-1])
        for sparsity, plan in plans.items():
            sparse = dense
            if sparsity:
                sparsify(model, plan, sparse_from=sparse_from)
                sparse = log_probabilities(logits_of(model, tokens)[:, start:-1])
            nll = -sparse.gather(-1, targets[..., None]).double().sum()
            kl = F.kl_div(sparse, dense, reduction="sum", log_target=True).double()
            sums[sparsity] = sums[sparsity] + torch.stack([nll, kl])
    tokens_scored = held_out[:, start + 1 :].numel()
    means = {sparsity: (total / tokens_scored).tolist() for sparsity, total in sums.items()}
    return {sparsity: (math.exp(nll), kl) for sparsity, (nll, kl) in means.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["babyllama361-hf", "stories260K-hf"])
def test_uniform_plans_on_trained_models_give_the_published_perplexities(
    shared_data: Path, name: str
) -> None:
    model = load_model(str(shared_data / "models" / name))
    tokenizer = load_tokenizer(str(shared_data / "models" / name))
    length, texts = context_length(model.config), shared_data / "text"
    train = texts / "tinystories_train_head.txt"
    windows = story_windows(train, tokenizer, length, CALIBRATION_TOKENS)
    stats = calibrate(model, windows, batch_size=16)
    held_out = story_windows(texts / "tinystories_val_head.txt", tokenizer, length, 61_440)
    for sparse_from in (0.5, 0.0):
        published = PUBLISHED[name, sparse_from]
        plans = {sparsity: allocate(stats, sparsity=sparsity) for sparsity in published}
        scores = published_scores(model, held_out, plans, sparse_from)
        for sparsity, (perplexity, kl) in scores.items():
            # Far from dense, rounding errors decide which tokens still come out right, and they
            # differ between processors: 48.2 and 48.3 were measured where 47.3 was published.
            allowed = TOLERANCES["perplexity"] + TOLERANCES["perplexity_per_kl"] * kl
            assert perplexity == pytest.approx(published[sparsity], rel=allowed), sparsity


def test_a_plan_for_weights_of_another_format_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, LENGTH)
    plan = replace(plan_for(model, 0.3), weight_format="int8")
    compare(model, tokens, [plan, plan])
    assert len(caplog.messages) == 1
    assert "calibrated with int8 weights, the model has float ones" in caplog.messages[0]
    sparsify(model, plan)
    assert len(caplog.messages) == 2
