import json

import pytest
import torch

from teal.benchmark.decode import DecodeResult, measure
from teal.benchmark.model import BenchmarkModel, Workload
from teal.engine.weights.loader import open_model
from tests.helpers import tiny_model


class Slow:
    """A baseline that takes half a second per token."""

    name = "slow"

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def time(self, prompt: list[int], new_tokens: int) -> float:
        self.calls.append((len(prompt), new_tokens))
        return 5e5


@pytest.fixture
def results(device: torch.device) -> tuple[list[DecodeResult], Slow]:
    workload = Workload(prompt_tokens=8, new_tokens=12, repeats=2)
    model = BenchmarkModel("tiny", open_model(tiny_model("llama").to(device)), workload)
    baseline = Slow()
    return measure(model, [0.5], [baseline], bandwidth=1e9), baseline


def test_dense_sparse_and_baselines_are_timed(results: tuple[list[DecodeResult], Slow]) -> None:
    dense, sparse, slow = results[0]
    assert [row.runner for row in results[0]] == ["teal", "teal", "slow"]
    assert [row.sparsity for row in results[0]] == [0.0, 0.5, 0.0]
    assert dense.effective_sparsity == slow.effective_sparsity == 0.0
    assert 0.3 < sparse.effective_sparsity < 0.7


def test_records_name_the_formats_of_weights() -> None:
    workload = Workload(prompt_tokens=8, new_tokens=4, repeats=1)
    opened = open_model(tiny_model("llama"), quantize="int8", quantize_head=True)
    ours, baseline = measure(BenchmarkModel("tiny", opened, workload), [], [Slow()], bandwidth=1e9)
    quantized = {"format": "int8", "group_size": None, "head_format": "int8"}
    floats = {"format": "float", "group_size": None, "head_format": "float"}
    assert (ours.to_dict()["weights"], baseline.to_dict()["weights"]) == (quantized, floats)
    assert baseline.read > 3 * ours.read


def test_first_round_is_not_counted(results: tuple[list[DecodeResult], Slow]) -> None:
    assert results[1].calls == [(8, 12)] * 3


def test_limit_and_speed_up_follow_from_the_times(
    results: tuple[list[DecodeResult], Slow], device: torch.device
) -> None:
    dense, sparse, slow = results[0]
    assert dense.limit == slow.limit == pytest.approx(dense.read * 1e-3)
    assert sparse.limit < dense.limit
    assert dense.speed_up == 1.0
    assert slow.speed_up == dense.token.median / 5e5
    assert (dense.start.bytes is None) == (device.type == "cpu")
    record = json.loads(json.dumps(slow.to_dict()))
    assert record["tokens_per_second"] == 2.0
    assert record["share_of_limit"] == slow.limit / 5e5
