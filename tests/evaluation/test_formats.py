import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.compression import quantize_model
from teal.evaluation import WeightFormat, compare, compare_formats, evaluate
from teal.evaluation.comparison import Evaluation
from teal.evaluation.formats import plans_for
from teal.foundation.errors import UserError
from teal.models.weight_format import mark_weight_format
from teal.quantization import Scheme
from tests.helpers import plan_for, tiny_model, tiny_tokens

LENGTH = 24
INT8 = Scheme(format="int8")
INT4 = Scheme(format="int4", group_size=32)
AS_IT_IS = WeightFormat()


def model_of() -> Any:
    return tiny_model("llama", hidden_size=64, intermediate_size=96)


def tokens_of() -> Tensor:
    return tiny_tokens(3, LENGTH)


def test_every_format_takes_every_plan_on_the_same_tokens() -> None:
    model = model_of()
    formats = [AS_IT_IS, WeightFormat(scheme=INT8), WeightFormat(scheme=INT4, quantize_head=True)]
    result = compare_formats(model, tokens_of(), formats, [plan_for(model, 0.3)])
    shown = [(row.weight_format, row.group_size, row.head_format) for row in result.rows]
    int8, int4 = ("int8", None, "float"), ("int4", 32, "int8")
    assert shown == [("float", None, "float"), int8, int8, int4, int4]
    assert [row.plan is None for row in result.rows] == [False, True, False, True, False]
    assert (result.weight_format, result.tokens) == ("float", 3 * (LENGTH - 1 - LENGTH // 2))


def test_scores_are_those_of_the_quantized_model_and_distances_those_to_the_dense() -> None:
    model, tokens = model_of(), tokens_of()
    plan = plan_for(model, 0.3)
    result = compare_formats(model, tokens, [WeightFormat(scheme=INT4)], [plan])
    dense, sparse = (row.score for row in result.rows)
    rounded = model_of()
    quantize_model(rounded, INT4)
    alone = evaluate(rounded, tokens, plan)
    assert result.dense == evaluate(model_of(), tokens, sparse_from=0.5).dense
    assert dense.nll == alone.dense.nll != result.dense.nll
    assert sparse.nll == alone.sparse[0].nll
    assert sparse.effective_sparsity == alone.sparse[0].effective_sparsity
    assert 0 < dense.kl < sparse.kl != alone.sparse[0].kl


def test_more_bits_are_nearer_to_the_dense_model() -> None:
    formats = [WeightFormat(scheme=scheme) for scheme in (INT8, INT4)]
    result = compare_formats(model_of(), tokens_of(), formats, [])
    int8, int4 = (row.score.kl for row in result.rows)
    assert 0 < int8 < int4 / 10


def test_a_rounded_head_alone_is_a_format() -> None:
    result = compare_formats(model_of(), tokens_of(), [WeightFormat(quantize_head=True)], [])
    (row,) = result.rows
    assert (row.weight_format, row.head_format) == ("float", "int8")
    assert row.score.kl > 0


def test_the_model_keeps_its_weights() -> None:
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    formats = [WeightFormat(scheme=INT4, quantize_head=True)]
    compare_formats(model, tokens_of(), formats, [plan_for(model, 0.3)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_format_takes_its_own_plans_or_those_of_floats_or_all() -> None:
    model = model_of()
    floats, int8 = plan_for(model, 0.3), replace(plan_for(model, 0.3), weight_format="int8")
    assert plans_for("int8", [floats, int8, int8]) == [int8, int8]
    assert plans_for("int4", [int8, floats]) == [floats]
    assert plans_for("int4", [int8]) == [int8]
    assert plans_for("int4", []) == []


def test_rows_say_with_what_their_plans_were_calibrated() -> None:
    model = model_of()
    plans = [plan_for(model, 0.3)]
    result = compare_formats(model, tokens_of(), [WeightFormat(scheme=INT8)], plans).to_dict()
    dense, sparse = result["rows"]
    assert (dense["calibrated_with"], dense["strategy"]) == (None, None)
    assert (dense["target_sparsity"], sparse["target_sparsity"]) == (0.0, 0.5)
    assert (sparse["calibrated_with"], sparse["strategy"]) == ("float", "uniform")
    assert {"perplexity", "standard_error", "kl", "top1_agreement"} <= set(sparse)


def test_a_plan_that_no_format_takes_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of()
    for_int8 = replace(plan_for(model, 0.3), weight_format="int8")
    compare_formats(model, tokens_of(), [AS_IT_IS], [plan_for(model, 0.3)])
    assert "was not scored" not in caplog.text
    compare_formats(model, tokens_of(), [AS_IT_IS], [plan_for(model, 0.3), for_int8])
    assert "A plan for int8 weights was not scored" in caplog.text
    assert "--quantize int8" in caplog.text


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(UserError, match="at least one WeightFormat"):
        compare_formats(model_of(), tokens_of(), [], [])


def test_a_quantized_model_is_not_quantized_again() -> None:
    model = model_of()
    mark_weight_format(model, "int8")
    with pytest.raises(UserError, match="quantized already"):
        compare_formats(model, tokens_of(), [WeightFormat(scheme=INT4)], [])


def test_one_rounded_copy_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []

    def watched(candidate: Any, *args: Any, **options: Any) -> Evaluation:
        gc.collect()
        assert all(copy() is None for copy in copies)
        copies.append(weakref.ref(candidate))
        return compare(candidate, *args, **options)

    monkeypatch.setattr("teal.evaluation.formats.compare", watched)
    wanted = [WeightFormat(scheme=scheme) for scheme in (INT8, INT4, INT8)]
    compare_formats(model_of(), tokens_of(), wanted, [])
    assert len(copies) == 3
