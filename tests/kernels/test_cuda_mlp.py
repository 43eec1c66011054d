import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teal.kernels import reference

pytest.importorskip("cuda.bindings")

from stepping import (
    MULTIPLIER,
    SCHEMES,
    Wanted,
    exact_product,
    fixed,
    hopper,
    magnitude,
    memory_of,
    normed,
    outlined,
    projections_of,
    thresholds_at,
)

from teal.kernels.cuda_compile import compiled
from teal.kernels.cuda_mlp import SOURCE, can_fuse, definitions_of, mlp, own_channels
from teal.kernels.cuda_step import UNIT, Input, Projections, StepMemory
from teal.kernels.cuda_strips import DTYPES

HIDDEN, INTERMEDIATE = 640, 1120

schemes = pytest.mark.parametrize("scheme", SCHEMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
activations = pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])


def pair(
    scheme: str,
    activation: Input = "silu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = False,
    device: str = "cuda",
) -> tuple[Projections, Projections]:
    kind = SCHEMES[scheme]
    gate_up = Wanted("hidden", HIDDEN, [INTERMEDIATE] * 2, kind, dtype, bias)
    down = Wanted(activation, INTERMEDIATE, [HIDDEN], kind, dtype, bias, seed=3)
    return projections_of(gate_up, device=device), projections_of(down, device=device)


def stream_of(memory: StepMemory) -> Tensor:
    hidden = 3 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2)).cuda()
    memory.stream.copy_(fixed(hidden))
    # What is to be cleared, and not read.
    memory.hidden[2].fill_(7)
    return hidden


@pytest.fixture(autouse=True)
def _needs_clusters(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not hopper():
        pytest.skip("needs a GPU with clusters")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("sparsity", [None, 0.5, 0.9, 1.0], ids=str)
@activations
@schemes
@dtypes
def test_the_stream_gains_the_mlp_of_the_kept_channels(
    dtype: torch.dtype, scheme: str, activation: Input, sparsity: float | None, bias: bool
) -> None:
    memory = memory_of(dtype)
    hidden = stream_of(memory)
    gate_up, down = pair(scheme, activation, dtype, bias=bias)
    x = normed(hidden, gate_up, dtype)
    if sparsity is not None:
        gate_up.thresholds.copy_(torch.tensor(thresholds_at(x, sparsity, 3)))
    gate, up = exact_product(gate_up, x).chunk(2)
    inner = (reference.GATES[activation](gate) * up).to(dtype)
    if sparsity is not None and sparsity < 1.0:
        down.thresholds.copy_(torch.tensor(thresholds_at(inner, sparsity, 3)))
    mlp(gate_up, down, memory, dependent=True)
    assert memory.complete == 1
    error = (
        memory.stream.double() * UNIT - hidden.double() - exact_product(down, inner) * MULTIPLIER
    )
    # Sums of gate and up err by little, which may still round an activation the other way.
    tolerance = torch.finfo(dtype).eps / 4
    assert error.abs().max() <= tolerance * magnitude(down, inner)
    assert not memory.overflow
    assert not memory.hidden[2].any()


@pytest.mark.gpu
@schemes
def test_the_same_bits_come_out_again(scheme: str) -> None:
    gate_up, down = pair(scheme)
    gate_up.thresholds.fill_(0.6)
    down.thresholds.fill_(0.2)
    results = []
    for _ in range(3):
        memory = memory_of(torch.bfloat16)
        stream_of(memory)
        mlp(gate_up, down, memory, dependent=True)
        results.append(memory.stream)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.gpu
def test_nan_sets_the_flag() -> None:
    gate_up, down = pair("floats")
    gate_up.weight[5, 7] = float("nan")
    memory = memory_of(torch.bfloat16)
    stream_of(memory)
    mlp(gate_up, down, memory, dependent=True)
    assert memory.overflow.item() == 1


@pytest.mark.parametrize("sizes", [(4096, 14336), (4096, 11008), (8192, 28672)], ids=str)
@schemes
def test_models_compile_without_spills(scheme: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("needs the tools in triton's wheel")
    hidden, intermediate = sizes
    gate_up = outlined(Wanted("hidden", hidden, [intermediate] * 2, SCHEMES[scheme]))
    down = outlined(Wanted("silu", intermediate, [hidden], SCHEMES[scheme]))
    assert can_fuse(gate_up, down)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(
        compiled(SOURCE, definitions_of(gate_up, down, memory_of(torch.bfloat16, "cpu")), "sm_90")
    )
    command = [cuobjdump, "--dump-resource-usage", cubin]
    used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"(?:STACK|LOCAL):(\d+)", used)) == {"0"}


@schemes
def test_a_block_owns_whole_groups_of_scales(scheme: str) -> None:
    gate_up, down = pair(scheme, device="cpu")
    own = own_channels(down)
    assert own % 8 == 0
    if down.grid is not None and len(down.grid.scales) > 1:
        assert own % down.grid.group_size == 0
    assert can_fuse(gate_up, down)


def test_unlike_formats_are_not_fused() -> None:
    gate_up, _ = pair("int8", device="cpu")
    _, down = pair("floats", device="cpu")
    assert not can_fuse(gate_up, down)
