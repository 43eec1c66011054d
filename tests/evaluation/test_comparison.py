import re
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
from teal.foundation.errors import UserError
from teal.models.families import FAMILIES
from teal.models.loading import context_length, load_model, load_tokenizer
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


# Perplexity at 0, 25, 40, 50 and 65 %, from the README beside the data: thresholds from
# tinystories_train_head.txt, 61k tokens of tinystories_val_head.txt.
PUBLISHED = {
    ("babyllama361-hf", 0.5): (1.867, 1.925, 2.291, 3.685, 26.3),
    ("babyllama361-hf", 0.0): (1.922, 1.984, 2.377, 3.767, 23.8),
    ("stories260K-hf", 0.5): (3.506, 3.626, 4.281, 6.643, 47.3),
    ("stories260K-hf", 0.0): (3.657, 3.797, 4.515, 7.029, 48.4),
}


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["babyllama361-hf", "stories260K-hf"])
def test_uniform_plans_on_trained_models_give_the_published_perplexities(
    shared_data: Path, name: str
) -> None:
    model = load_model(str(shared_data / "models" / name))
    tokenizer = load_tokenizer(str(shared_data / "models" / name))
    length, texts = context_length(model.config), shared_data / "text"
    stats = calibrate(
        model,
        story_windows(texts / "tinystories_train_head.txt", tokenizer, length),
        batch_size=16,
    )
    held_out = story_windows(texts / "tinystories_val_head.txt", tokenizer, length, 61_440)
    plans = [allocate(stats, sparsity=sparsity) for sparsity in (0.25, 0.4, 0.5, 0.65)]
    for sparse_from in (0.5, 0.0):
        result = compare(model, held_out, plans, sparse_from=sparse_from)
        measured = [(result.dense.perplexity, 0.0)]
        measured += [(score.perplexity, score.kl) for score in result.sparse]
        for (perplexity, kl), published in zip(measured, PUBLISHED[name, sparse_from], strict=True):
            # Far from dense, rounding errors decide which tokens still come out right, and they
            # differ between processors: 48.2 and 48.3 were measured where 47.3 was published.
            allowed = TOLERANCES["perplexity"] + TOLERANCES["perplexity_per_kl"] * kl
            assert perplexity == pytest.approx(published, rel=allowed)


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
