import math

import numpy as np
import pytest
import torch
from torch import Tensor

from teal.kernels.reference import matmul as reference
from tests.kernels.cases import EDGES, THRESHOLDS, VECTORS, draw
from tests.kernels.cpu.cases import dtypes

pytest.importorskip("numba")

from teal.kernels.cpu.kept_channels import compact, compact_inputs
from teal.kernels.cpu.numerics import ELEMENTS


def _bits(x: Tensor) -> np.ndarray:
    integers = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
    return x.view(integers.get(x.dtype, x.dtype)).numpy()


def _compacted(
    x: Tensor, threshold: float, score_scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[list[int], np.ndarray]:
    rows = _bits(x.reshape(-1, x.shape[-1]))
    channels = np.empty(rows.shape[1], np.int64)
    values = np.empty((rows.shape[1], rows.shape[0]), np.float32)
    addresses = [0 if vector is None else vector.data_ptr() for vector in (score_scale, shift)]
    kept = compact(rows, *addresses, np.float32(threshold), channels, values)
    return channels[:kept].tolist(), values[:kept]


@dtypes
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_kept_channels_equal_those_of_the_reference(
    dtype: torch.dtype, vectors: str, threshold: float
) -> None:
    unusual = torch.tensor([*EDGES, math.inf, -math.inf, math.nan, 65504.0])
    x = torch.cat([unusual, draw(200)]).to(dtype)
    x[20] = threshold
    score_scale = draw(len(x), seed=1).abs() if "score_scale" in vectors else None
    shift = draw(len(x), seed=2) if "shift" in vectors else None
    expected = reference.keep_mask(x, threshold, score_scale, shift).nonzero().flatten().tolist()
    assert _compacted(x, threshold, score_scale, shift)[0] == expected


@dtypes
def test_a_channel_is_kept_if_any_row_keeps_it_with_zero_for_the_rows_that_drop_it(
    dtype: torch.dtype,
) -> None:
    x = draw(8, 300, dtype=dtype)
    keep = reference.keep_mask(x, 1.9)
    expected = keep.any(dim=0).nonzero().flatten()
    channels, values = _compacted(x, 1.9)
    assert 0 < len(channels) < 300
    assert channels == expected.tolist()
    assert torch.equal(torch.from_numpy(values), torch.where(keep, x, 0).float().T[expected])


@dtypes
def test_each_mask_has_its_own_threshold_and_score_scale_behind_one_norm(
    dtype: torch.dtype,
) -> None:
    x, norm_weight = draw(2, 300, dtype=dtype), draw(300, dtype=dtype, seed=1)
    score_scale, thresholds = draw(2, 300, seed=2).abs(), (0.4, 0.9, 0.0)
    inputs = (x.data_ptr(), norm_weight.data_ptr(), score_scale.data_ptr(), 0)
    channels, values, counts = compact_inputs(
        ELEMENTS[dtype], inputs, (2, 300, 1), 2, thresholds, 1e-5
    )
    normed = reference.rms_norm(x, norm_weight, 1e-5)
    for mask in range(2):
        keep = reference.keep_mask(normed, thresholds[mask], score_scale[mask])
        expected = keep.any(dim=0).nonzero().flatten().tolist()
        assert channels[mask, : counts[mask]].tolist() == expected
        kept = torch.where(keep, normed, 0).float().T[expected]
        # The reference takes the mean of squares in another order.
        found = torch.from_numpy(values[mask, : counts[mask]])
        torch.testing.assert_close(found, kept, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
