import pytest
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from tests.helpers import relative_error
from tests.kernels.attention_cases import assert_attends
from tests.kernels.cases import ATTENTION_CASES, AttentionCase, attended
from tests.kernels.cpu.cases import dtypes

pytest.importorskip("numba")

from teal.kernels.cpu.attention import CHUNK, NumbaAttention
from teal.kernels.ops import attend

INF, NAN = float("inf"), float("nan")


def _at(*positions: int, **changes: object) -> AttentionCase:
    return AttentionCase(positions=positions, capacity=max(positions) + 5, **changes)


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 2])
@dtypes
def test_lengths_around_multiples_of_a_chunk_are_as_precise_as_torch(
    length: int, dtype: torch.dtype, two_threads: None
) -> None:
    assert_attends(attend, _at(length - 1, 3, heads=8, head_dim=64, rotary_dim=64), dtype)


@pytest.mark.parametrize("window", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_windows_around_multiples_of_a_chunk_are_as_precise_as_torch(
    window: int, two_threads: None
) -> None:
    position = 3 * CHUNK
    options = {"window": window}
    assert_attends(
        attend, _at(position, window - 1, window, window + 1, options=options), torch.float32
    )


def test_a_prompt_decoded_token_by_token_is_causal_attention() -> None:
    tokens, heads, head_dim = 70, 2, 8
    qkv = torch.randn(tokens, 1, 3 * heads * head_dim, generator=torch.Generator().manual_seed(0))
    keys, values = (torch.full((1, heads, tokens, head_dim), NAN) for _ in range(2))
    angles = torch.zeros(tokens, 4)
    rest = (angles.cos(), angles.sin())
    results = [
        attend(qkv[i], keys, values, torch.tensor([i]), *rest, scale=0.3) for i in range(tokens)
    ]
    q, k, v = qkv[:, 0].view(tokens, 3, heads, head_dim).double().permute(1, 2, 0, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    result = torch.stack(results).view(tokens, heads, head_dim).transpose(0, 1)
    assert relative_error(result, expected) < 1e-6


@pytest.mark.parametrize("positions", [(3 * CHUNK,), (CHUNK, 2 * CHUNK + 9, 5)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads_or_the_call(
    positions: tuple[int, ...], two_threads: None
) -> None:
    case = _at(*positions, heads=6, kv_heads=3, head_dim=64, rotary_dim=64)

    def result() -> Tensor:
        return attend(*case.tensors(torch.bfloat16), **case.arguments(torch.bfloat16))

    by_two = [result() for _ in range(3)]
    torch.set_num_threads(1)
    by_one = result()
    assert all(torch.equal(by_one, again) for again in by_two)


def test_a_sequence_has_the_bits_that_it_has_alone() -> None:
    case = ATTENTION_CASES["several sequences"]
    tensors, options = case.tensors(torch.bfloat16), case.arguments(torch.bfloat16)
    rows = [
        [*(tensor[row : row + 1].clone() for tensor in tensors[:4]), *tensors[4:]]
        for row in range(len(case.positions))
    ]
    together = attend(*tensors, **options)
    assert torch.equal(together, torch.cat([attend(*row, **options) for row in rows]))


def test_scores_of_any_size_do_not_overflow() -> None:
    case = AttentionCase(positions=(30,), options={"scale": 1e4})
    tensors, options = case.tensors(torch.float32), case.arguments(torch.float32)
    exact, _, _ = attended(*tensors, **options)
    assert relative_error(attend(*tensors, **options), exact) < 1e-2


@pytest.mark.parametrize("positions", [(40,), (-1,), (3, 40)], ids=str)
def test_a_position_outside_the_cache_is_refused_and_changes_nothing(
    positions: tuple[int, ...],
) -> None:
    case = AttentionCase(positions=(3,) * len(positions))
    tensors = list(case.tensors(torch.float32))
    tensors[3] = torch.tensor(positions)
    before = tensors[1].clone()
    with pytest.raises(UserError, match="inside a cache of 40 tokens"):
        attend(*tensors, **case.arguments(torch.float32))
    torch.testing.assert_close(tensors[1], before, rtol=0, atol=0, equal_nan=True)


def test_float64_is_refused_with_the_reason() -> None:
    tensors = AttentionCase().tensors(torch.float32)
    assert NumbaAttention().can_run(*tensors) is None
    reason = NumbaAttention().can_run(tensors[0].double(), *tensors[1:])
    assert reason == "qkv is not float32, bfloat16 or float16"
