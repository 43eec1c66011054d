import math

import pytest
import torch
from torch import Tensor

from teal.evaluation.scores import AgreementSums, NllSums, Score, SparseScore, log_probabilities


def random_log_probabilities(seed: int, tokens: int = 6, vocabulary: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return log_probabilities(torch.randn(tokens, vocabulary, generator=generator))


def test_mean_nll_is_over_tokens_not_windows() -> None:
    sums = NllSums()
    uniform = log_probabilities(torch.zeros(2, 4))
    certain = log_probabilities(torch.tensor([[100.0, 0.0, 0.0, 0.0]] * 6))
    sums.add(uniform, torch.tensor([1, 2]))
    sums.add(certain, torch.zeros(6, dtype=torch.int64))
    assert sums.mean == pytest.approx(2 * math.log(4) / 8)
    assert sums.tokens == 8


def test_standard_error_of_equal_windows_is_that_of_their_means() -> None:
    sums = NllSums()
    means = []
    for seed in range(5):
        log_p = random_log_probabilities(seed)
        targets = torch.arange(6)
        sums.add(log_p, targets)
        means.append(-log_p[torch.arange(6), targets].double().mean())
    expected = torch.stack(means).std() / math.sqrt(5)
    assert sums.standard_error == pytest.approx(float(expected), rel=1e-5)


def test_one_window_has_no_standard_error() -> None:
    sums = NllSums()
    sums.add(random_log_probabilities(0), torch.arange(6))
    assert sums.standard_error is None


def test_kl_of_a_distribution_with_itself_is_zero_and_agreement_whole() -> None:
    sums = AgreementSums()
    log_p = random_log_probabilities(0)
    sums.add(log_p, log_p)
    assert sums.kl == 0.0
    assert sums.agreed == sums.tokens == 6


def test_kl_is_of_dense_from_sparse() -> None:
    sums = AgreementSums()
    dense, sparse = random_log_probabilities(0), random_log_probabilities(1)
    sums.add(dense, sparse)
    expected = (dense.double().exp() * (dense.double() - sparse.double())).sum()
    assert sums.kl == pytest.approx(float(expected), rel=1e-5)
    assert sums.agreed == int((dense.argmax(-1) == sparse.argmax(-1)).sum())


def test_perplexity_error_is_to_first_order() -> None:
    score = Score(nll=1.0, standard_error=0.1)
    assert score.perplexity_error == pytest.approx(math.e * 0.1)
    assert Score(nll=1.0, standard_error=None).to_dict()["standard_error"] is None


def test_sparse_score_adds_its_three_figures() -> None:
    score = SparseScore(
        nll=1.0, standard_error=None, effective_sparsity=0.5, kl=0.1, top1_agreement=0.9
    )
    assert score.to_dict() == {
        "nll": 1.0,
        "perplexity": pytest.approx(math.e),
        "standard_error": None,
        "effective_sparsity": 0.5,
        "kl": 0.1,
        "top1_agreement": 0.9,
    }
