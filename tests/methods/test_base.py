import pytest
import torch

from teal.foundation.errors import UserError
from teal.kernels.reference.matmul import keep_mask
from teal.methods import MaskRule


@pytest.mark.parametrize("threshold", [-1.0, -1e-30, float("nan"), float("-inf")])
def test_threshold_that_is_no_score_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match=r"^Threshold .* is not a number ≥ 0\. Calibrate anew"):
        MaskRule(threshold=threshold)


def test_threshold_is_rounded_to_float32_once_and_for_all() -> None:
    rule = MaskRule(threshold=0.1)
    assert rule.threshold == torch.tensor(0.1, dtype=torch.float32).item() != 0.1
    assert not keep_mask(torch.tensor([0.1]), rule.threshold).item()


def test_rule_lists_only_the_vectors_that_it_has() -> None:
    score_scale = torch.ones(3)
    assert dict(MaskRule(threshold=1.0).vectors) == {}
    assert dict(MaskRule(threshold=1.0, score_scale=score_scale).vectors) == {
        "score_scale": score_scale
    }
