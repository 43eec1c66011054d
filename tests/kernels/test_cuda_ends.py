import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("cuda.bindings")

from stepping import EPSILON, SIZES, hopper, memory_of

from teal.kernels.cuda_compile import compiled
from teal.kernels.cuda_ends import SOURCE, choose, definitions_of, embed, finish
from teal.kernels.cuda_step import UNIT
from teal.kernels.cuda_strips import DTYPES

INFINITY = float("inf")
BROKEN = -1

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize(("architecture", "cluster"), [("sm_80", 1), ("sm_90", 8), ("sm_100", 8)])
@dtypes
def test_both_ends_compile(dtype: torch.dtype, architecture: str, cluster: int) -> None:
    assert compiled(SOURCE, definitions_of(dtype, cluster), architecture)


@pytest.mark.gpu
@dtypes
def test_a_step_begins_with_the_embedding_and_ends_with_the_norm(dtype: torch.dtype) -> None:
    memory, size = memory_of(dtype), SIZES[0]
    embedding = torch.randn(7, size, device="cuda").to(dtype)
    gain = torch.rand(size, device="cuda")
    position = torch.tensor([41], device="cuda")
    memory.overflow.fill_(1)
    memory.hidden.fill_(5)
    memory.gate_up.fill_(5)
    embed(torch.tensor([3], device="cuda"), embedding, memory, 2.0, dependent=hopper())
    assert not memory.overflow
    assert not memory.gate_up[0].any()
    torch.testing.assert_close(memory.hidden.double() * UNIT, 2.0 * embedding[3].double())
    finish(gain, EPSILON, memory, position, dependent=hopper())
    exact = 2.0 * F.rms_norm(embedding[3].double(), (size,), gain.double() / 2.0, EPSILON / 4)
    torch.testing.assert_close(
        memory.normed[0].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0
    )
    assert position.item() == 42


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 31, 8192, 8193, 128256])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["", "negative"])
@pytest.mark.parametrize("place", ["device", "host"])
def test_the_likeliest_token_is_chosen_and_the_first_of_equals(
    size: int, sign: float, place: str
) -> None:
    logits = sign * torch.rand(1, size, generator=torch.Generator().manual_seed(3))
    # Many equals, of which several are the largest.
    logits = (logits * 16).round().cuda()
    token, step = torch.full((1,), 9).cuda(), torch.full((1,), 2).cuda()
    history = torch.full((4, 1), 9)
    history = history.pin_memory() if place == "host" else history.cuda()
    choose(logits, token, history, step, BROKEN)
    torch.cuda.synchronize()
    best = int(logits.cpu().argmax())
    assert token.item() == best
    assert history[:, 0].tolist() == [9, 9, best, 9]
    assert step.item() == 3


@pytest.mark.gpu
@pytest.mark.parametrize("fault", [float("nan"), -float("nan"), INFINITY])
def test_a_fault_anywhere_is_told_and_the_token_stays_one_of_the_vocabulary(fault: float) -> None:
    logits = torch.randn(1, 5000, device="cuda")
    logits[0, 4321] = fault
    token, step = torch.zeros(1, dtype=torch.int64).cuda(), torch.zeros(1, dtype=torch.int64).cuda()
    history = torch.zeros(1, 1, dtype=torch.int64).cuda()
    choose(logits, token, history, step, BROKEN)
    assert history.item() == BROKEN
    assert token.item() == 4321


@pytest.mark.gpu
def test_logits_that_rule_out_every_token_are_a_fault() -> None:
    logits = torch.full((1, 300), -INFINITY, device="cuda")
    token, step = torch.zeros(1, dtype=torch.int64).cuda(), torch.zeros(1, dtype=torch.int64).cuda()
    history = torch.zeros(1, 1, dtype=torch.int64).cuda()
    choose(logits, token, history, step, BROKEN)
    assert history.item() == BROKEN
    assert token.item() == 0
