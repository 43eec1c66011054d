"""The backends of products, behind one face: each says which rows of parameters suit it."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.kernels.operands import Operands, QuantParams
from tests.kernels.products import SCHEMES
from tests.pairwise import pairwise

try:
    from teal.kernels.cpu.gemv import NumbaBackend
except ImportError:
    NumbaBackend = None  # type: ignore[assignment, misc]
try:
    from teal.kernels.triton import gemv as triton_gemv
    from teal.kernels.triton.tile_config import TileConfig
except ImportError:
    triton_gemv = None  # type: ignore[assignment]
try:
    from teal.kernels.cuda import gemv as cuda_gemv
    from tests.kernels.emulation import emulate
except ImportError:
    cuda_gemv = None  # type: ignore[assignment]

# Triton's interpreter runs in a process of its own, for Triton's tests only.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class ProductBackend:
    """A backend of products and what it takes.

    Attributes:
        name: Name in the ids of tests.
        device: Device of its tensors.
        dtypes: Dtypes of activations.
        formats: Names in `SCHEMES`.
        rows: Shapes of rows of activations.
        sizes: Channels and columns of one part.
        unit: The columns of a part are a multiple of this.
        norm_unit: The channels behind a norm are a multiple of this.
        settings: What else changes the way it computes, by name.
        run: Computes a product in a setting.
    """

    name: str
    device: str
    dtypes: Sequence[torch.dtype]
    formats: Sequence[str]
    rows: Sequence[tuple[int, ...]]
    sizes: Sequence[tuple[int, int]]
    unit: int = 1
    norm_unit: int = 1
    settings: Sequence[str]
    run: Callable[[Operands, QuantParams | None, str], Tensor]

    def parameters(self) -> dict[str, Sequence[Any]]:
        """Return what every suite of products varies."""
        return {
            "dtype": self.dtypes,
            "scheme": self.formats,
            "rows": self.rows,
            "size": self.sizes,
            "setting": self.settings,
        }


def _on_numba(operands: Operands, quant: QuantParams | None, setting: str) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(2 if setting == "two threads" else 1)
    try:
        assert NumbaBackend().can_run(operands, quant) is None
        return NumbaBackend().run(operands, quant)
    finally:
        torch.set_num_threads(before)


_TILES: Mapping[str, Mapping[str, int] | None] = {
    "tuned": None,
    "small": {"block_n": 32, "block_k": 64, "warps": 1, "unroll": 2},
    "one chunk": {"block_n": 64, "block_k": 1024, "warps": 2, "unroll": 8},
    "wide": {"block_n": 128, "block_k": 128, "warps": 4, "unroll": 4},
}


def _on_triton(operands: Operands, quant: QuantParams | None, setting: str) -> Tensor:
    # A dense product is refused only because torch is faster.
    sparse = operands._replace(thresholds=[0.5] * len(operands.thresholds))
    assert triton_gemv.TritonBackend().can_run(sparse, quant) is None
    x, residual, tile = operands.x, operands.residual, _TILES[setting]
    flat = operands._replace(
        x=x.reshape(-1, x.shape[-1]).contiguous(),
        residual=None if residual is None else residual.reshape(-1, residual.shape[-1]),
    )
    result = triton_gemv.launch(flat, None if tile is None else TileConfig(**tile))
    return result.view(*x.shape[:-1], result.shape[-1])


def _on_cuda(operands: Operands, quant: QuantParams | None, setting: str) -> Tensor:
    del setting
    # Others may be faster, but it has to be able to.
    assert cuda_gemv._obstacle(operands, quant) is None
    return cuda_gemv.compute(operands, quant)


_CLUSTERS = ("clusters", "single blocks")


def _on_emulated_cuda(operands: Operands, quant: QuantParams | None, setting: str) -> Tensor:
    with pytest.MonkeyPatch.context() as monkeypatch:
        emulate(monkeypatch, clusters=setting == "clusters")
        return _on_cuda(operands, quant, setting)


_CUDA: Mapping[str, Any] = {
    "dtypes": (torch.bfloat16, torch.float16),
    "formats": tuple(SCHEMES),
    "unit": 32,
    "norm_unit": 8,
}

BACKENDS: Mapping[str, ProductBackend] = {
    backend.name: backend
    for backend in (
        ProductBackend(
            name="cpu",
            device="cpu",
            dtypes=FLOATS,
            formats=tuple(SCHEMES),
            rows=[(1,), (), (2, 1), (8,)],
            sizes=[(63, 129), (300, 64), (1025, 33), (700, 257), (4097, 9)],
            settings=("one thread", "two threads"),
            run=_on_numba,
        ),
        ProductBackend(
            name="emulated",
            device="cpu",
            # More rows: cuda/test_gemv_config.py.
            rows=[(1,), (), (2,), (3, 1)],
            sizes=[(63, 32), (299, 160), (520, 96)],
            settings=_CLUSTERS,
            run=_on_emulated_cuda,
            **_CUDA,
        ),
        ProductBackend(
            name="cuda",
            device="cuda",
            rows=[(1,), (), (2,), (5, 1), (8,)],
            sizes=[(63, 32), (299, 288), (1048, 544), (4100, 1056)],
            settings=("tuned",),
            run=_on_cuda,
            **_CUDA,
        ),
        ProductBackend(
            name="triton",
            device="cpu" if INTERPRETED else "cuda",
            # The interpreter cuts float32 to bfloat16 where the hardware rounds.
            dtypes=FLOATS[:2] if INTERPRETED else FLOATS,
            formats=("floats",),
            rows=[(1,), (2,), (), (2, 1)],
            sizes=[(63, 129), (300, 64), (257, 33)],
            settings=tuple(_TILES),
            run=_on_triton,
        ),
    )
}
_INSTALLED = {
    "cpu": NumbaBackend,
    "emulated": cuda_gemv,
    "cuda": cuda_gemv,
    "triton": triton_gemv,
}


def backends_here() -> list[ProductBackend]:
    """Return the backends whose tests this process collects.

    Tests on a GPU are marked so, and an emulated one is of no use beside it.
    """
    return [
        backend
        for name, backend in BACKENDS.items()
        if _INSTALLED[name] is not None
        and (name == "triton" or not INTERPRETED)
        and not (name == "emulated" and HAS_GPU)
    ]


def over_backends(**parameters: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by `backend` and `row`: for each backend rows in which all pairs meet.

    Args:
        parameters: What the test varies; a name of `ProductBackend.parameters` takes the values of
            the backend where it stands for `...`.
    """
    cases = []
    for backend in backends_here():
        values = _values_for(backend, parameters)
        # A backend that does not know any of the formats has no rows.
        rows = pairwise(**values) if all(values.values()) else []
        for row in rows:
            name = "-".join([backend.name, *map(str, row.values())])
            marks = [pytest.mark.gpu] if backend.name in ("cuda", "triton") else []
            cases.append(pytest.param(backend, row, id=name, marks=marks))
    return pytest.mark.parametrize(("backend", "row"), cases)


def _values_for(
    backend: ProductBackend, parameters: Mapping[str, Sequence[Any]]
) -> dict[str, Sequence[Any]]:
    """Return the values of parameters that a backend takes."""
    own = backend.parameters()
    values = {name: own[name] if given is ... else given for name, given in parameters.items()}
    if "scheme" in values:
        values["scheme"] = [name for name in values["scheme"] if name in backend.formats]
    return values


def rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
