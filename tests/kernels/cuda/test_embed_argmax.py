import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("cuda.bindings")

from teal.kernels.cuda.decode_step import UNIT
from teal.kernels.cuda.embed_argmax import (
    SOURCE,
    argmax,
    embed,
    embed_argmax_config,
    final_norm,
)
from teal.kernels.cuda.nvrtc import compiled
from teal.kernels.cuda.tile_config import DTYPES
from tests.kernels.compiling import assert_no_spills, dumped
from tests.kernels.emulation import DEVICE, emulate
from tests.kernels.stepping import EPS, SIZES, hopper, memory_of

INFINITY = float("inf")
BROKEN = -1

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
logit_dtypes = pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)


def argmax_of(logits: Tensor) -> tuple[int, int]:
    """Return the token and its entry in the history."""
    token, step = torch.full((1,), 9).to(DEVICE), torch.zeros(1, dtype=torch.int64).to(DEVICE)
    history = torch.full((1, 1), 9).to(DEVICE)
    argmax(logits, token, history, step, BROKEN)
    return int(token), int(history)


@pytest.mark.parametrize(("architecture", "cluster"), [("sm_80", 1), ("sm_90", 8), ("sm_100", 8)])
@logit_dtypes
def test_embedding_final_norm_and_argmax_compile(
    dtype: torch.dtype, architecture: str, cluster: int, tmp_path: Path
) -> None:
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(SOURCE, embed_argmax_config(dtype, cluster), architecture))
    assert_no_spills(cubin)
    code = dumped(cubin, "--dump-sass").split("Function : argmax")[1].split("Function :")[0]
    # A thread has two loads of 16 bytes in flight, and no block waits for its writes to be visible.
    assert re.search(r"LDG\.E\.128(.*\n){1,12}.*LDG\.E\.128", code)
    assert "MEMBAR" not in code


@pytest.mark.gpu
@dtypes
def test_a_step_begins_with_the_embedding_and_ends_with_the_norm(dtype: torch.dtype) -> None:
    memory, size = memory_of(dtype, DEVICE), SIZES[0]
    embedding = torch.randn(7, size, device=DEVICE).to(dtype)
    norm_weight = torch.rand(size, device=DEVICE)
    position = torch.tensor([41], device=DEVICE)
    memory.overflow.fill_(1)
    memory.hidden.fill_(5)
    memory.gate_up.fill_(5)
    embed(torch.tensor([3], device=DEVICE), embedding, memory, 2.0, dependent=hopper())
    assert not memory.overflow
    assert not memory.gate_up[0].any()
    torch.testing.assert_close(memory.hidden.double() * UNIT, 2.0 * embedding[3].double())
    final_norm(norm_weight, EPS, memory, position, dependent=hopper())
    exact = 2.0 * F.rms_norm(embedding[3].double(), (size,), norm_weight.double() / 2.0, EPS / 4)
    # Denormal numbers have fewer bits: for them the last bit counts.
    eps, last_bit = (
        torch.finfo(dtype).eps,
        torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps,
    )
    torch.testing.assert_close(memory.normed[0].double(), exact, rtol=2 * eps, atol=last_bit)
    assert position.item() == 42


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 31, 8192, 8193, 128256, 128263, 262144])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["", "negative"])
@pytest.mark.parametrize("place", ["device", "host"])
@logit_dtypes
def test_argmax_is_the_likeliest_token_and_the_first_of_equals(
    dtype: torch.dtype, size: int, sign: float, place: str
) -> None:
    logits = sign * torch.rand(1, size, generator=torch.Generator().manual_seed(3))
    # Many logits are equal, and several are the largest.
    logits = (logits * 16).round().to(DEVICE, dtype)
    token, step = torch.full((1,), 9).to(DEVICE), torch.full((1,), 2).to(DEVICE)
    history = torch.full((4, 1), 9)
    history = history.pin_memory() if place == "host" else history.to(DEVICE)
    argmax(logits, token, history, step, BROKEN)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    best = int(logits.cpu().argmax())
    assert token.item() == best
    assert history[:, 0].tolist() == [9, 9, best, 9]
    assert step.item() == 3


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1, 65535, 65536, 99999, 100000, 100006])
@logit_dtypes
def test_a_logit_is_found_wherever_it_is(dtype: torch.dtype, index: int) -> None:
    logits = torch.randn(1, 100007, device=DEVICE).clamp(max=3).to(dtype)
    logits[0, index] = 3.5
    assert argmax_of(logits) == (index, index)


@pytest.mark.gpu
@logit_dtypes
def test_logits_may_begin_anywhere_in_memory(dtype: torch.dtype) -> None:
    memory = torch.randn(1, 20001, device=DEVICE).to(dtype)
    memory[0, 0] = 100
    memory[0, 12345] = 50
    assert argmax_of(memory[:, 1:]) == (12344, 12344)


@pytest.mark.gpu
@logit_dtypes
def test_zeros_of_either_sign_are_equal(dtype: torch.dtype) -> None:
    logits = torch.full((1, 300), -1.0).to(DEVICE, dtype)
    logits[0, 17], logits[0, 18] = -0.0, 0.0
    assert argmax_of(logits) == (17, 17)


@pytest.mark.gpu
@pytest.mark.parametrize("sign", [0, -1], ids=["", "negative"])
@logit_dtypes
def test_nan_of_either_sign_is_reported(dtype: torch.dtype, sign: int) -> None:
    logits = torch.randn(1, 5000, device=DEVICE).to(dtype)
    logits[0, 4321] = float("nan")
    bits = logits.view(torch.int16 if dtype in DTYPES else torch.int32)
    bits[0, 4321] |= sign << (8 * bits.itemsize - 1)
    assert argmax_of(logits) == (4321, BROKEN)


@pytest.mark.gpu
@logit_dtypes
def test_infinity_is_reported_and_the_token_stays_in_the_vocabulary(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 5000, device=DEVICE).to(dtype)
    logits[0, 4321] = INFINITY
    assert argmax_of(logits) == (4321, BROKEN)


@pytest.mark.gpu
@logit_dtypes
def test_logits_that_are_all_minus_infinity_are_reported(dtype: torch.dtype) -> None:
    logits = torch.full((1, 300), -INFINITY).to(DEVICE, dtype)
    assert argmax_of(logits) == (0, BROKEN)


@logit_dtypes
def test_embedding_final_norm_and_argmax_are_right_on_an_emulated_gpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, clusters=False)
    if dtype in DTYPES:
        test_a_step_begins_with_the_embedding_and_ends_with_the_norm(dtype)
    for size in (1, 31, 8193):
        test_argmax_is_the_likeliest_token_and_the_first_of_equals(dtype, size, -1.0, "device")
    test_zeros_of_either_sign_are_equal(dtype)
    # On a CPU an addition treats the sign of NaN differently.
    test_nan_of_either_sign_is_reported(dtype, 0)
    test_infinity_is_reported_and_the_token_stays_in_the_vocabulary(dtype)
