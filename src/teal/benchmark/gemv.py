"""Times sparse products beside dense ones, with weights that do not fit into any cache."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.benchmark.model_configs import Shape
from teal.benchmark.timing import Call, Timing, time_call
from teal.foundation.errors import UserError
from teal.kernels import ops
from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference import matmul as reference

ACTIVATION = "silu"

# Several times the largest last-level cache of the device.
_ROTATION_BYTES = {"cuda": 1_100_000_000, "cpu": 550_000_000}
# As in the kernel tests; the exponential in an activation is accurate to one eps.
_ERROR_FACTOR = 2.0
_ERROR_EPS = {"plain": 0.125, "parts": 0.125, "gated": 1.0}


@dataclass(frozen=True, kw_only=True)
class GemvResult:
    """Times of one product at one sparsity, beside dense.

    Attributes:
        shape: Shape of the product.
        dtype: Dtype of activations, and of a float weight.
        rows: Token rows.
        sparsity: Target sparsity of each row.
        read: Fraction of the weight rows read: those that at least one token row keeps.
        error: Error of the sparse product against float64, rms over rms.
        dense: Fastest dense product on either layout of a float weight; with a quantized weight,
            our own dense product.
        sparse: Our sparse product.
        baseline: TEAL's own kernel, if asked for.
        limit: Microseconds to read the kept weight rows at full bandwidth.
        bandwidth: Bytes per second that the sparse product read.
        format: Format of a quantized weight, such as "int8"; `None` for floats.
        floats: Fastest dense product with float weights, if the weight is quantized.
    """

    shape: Shape
    dtype: str
    rows: int
    sparsity: float
    read: float
    error: float
    dense: Timing
    sparse: Timing
    baseline: Timing | None
    limit: float
    bandwidth: float
    format: str | None = None
    floats: Timing | None = None

    @property
    def speed_up(self) -> float:
        """Dense time ÷ sparse time."""
        return self.dense.median / self.sparse.median

    @property
    def share_of_limit(self) -> float:
        """Limit ÷ sparse time."""
        return self.limit / self.sparse.median

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form."""
        return {**asdict(self), "speed_up": self.speed_up, "share_of_limit": self.share_of_limit}


class Product:
    """One shape with random inputs: activations, and copies of a weight used in rotation.

    Args:
        shape: Shape of the product.
        dtype: Dtype of activations and of a float weight.
        device: Device to compute on.
        rows: Token rows.
        tuning: Folder of tuning tables, or "" for those of the package.

    Attributes:
        shape: Shape of the product.
        tuning: Folder of tuning tables, or "".
        weights: Channel-major weights, each (in_features, out_features).
        x: Activations, (rows, in_features).
        format: Format of a quantized weight; `None` for floats.
    """

    format: str | None = None

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        rows: int,
        *,
        tuning: str = "",
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        size = (shape.in_features, shape.out_features)
        self.shape = shape
        self.tuning = tuning
        weight = torch.randn(size, dtype=dtype, device=device, generator=generator)
        self._hold(weight)
        self.x = torch.randn(
            rows, shape.in_features, dtype=dtype, device=device, generator=generator
        )

    @property
    def copies(self) -> int:
        """Number of weights in rotation."""
        return len(self.weights)

    def threshold(self, sparsity: float) -> float:
        """Return the threshold that drops a fraction `sparsity` of x; below 0 drops nothing."""
        scores = self.x.float().abs().flatten().sort().values
        index = round(sparsity * len(scores)) - 1
        return float(scores[index]) if index >= 0 else -1.0

    def sparse(self, number: int, threshold: float) -> Tensor:
        """Multiply with weight `number`, modulo their count, through the operation of decoding."""
        weight, output_sizes = self.weights[number % self.copies], self.shape.output_sizes
        thresholds = [threshold] * len(output_sizes)
        if self.shape.form == "gated":
            return ops.sparse_glu(self.x, weight, thresholds, ACTIVATION, tuning=self.tuning)
        return ops.sparse_linear(self.x, weight, thresholds, output_sizes, tuning=self.tuning)

    def operands(self, number: int, threshold: float) -> tuple[Operands, QuantParams | None]:
        """Return the operands that kernels take, with weight `number`."""
        return self._operands(self.weights[number], threshold), None

    def check(self, threshold: float) -> float:
        """Return the error of the sparse product against float64.

        Raises:
            UserError: The error is larger than rounding explains.
        """
        kept = reference.sparse_activation(self.x, threshold)
        exact = self._finish(self._by_torch(kept.double()))
        by_torch = _error(self._finish(self._by_torch(kept)), exact)
        error = _error(self.sparse(0, threshold), exact)
        eps = _ERROR_EPS[self.shape.form] * torch.finfo(kept.dtype).eps
        if not error <= _ERROR_FACTOR * by_torch + eps:
            raise UserError(
                f"The product {self.shape.name} errs by {error:.1e}, torch's by {by_torch:.1e}. "
                "Times of a wrong product are not shown; please report this."
            )
        return error

    def read_bytes(self, read: float) -> float:
        """Return the bytes read by a product that keeps a fraction `read` of the weight rows."""
        return read * self.weights[0].nbytes

    def time(self, call: Call) -> Timing:
        """Time `call(i)`, which uses weight i, modulo their count."""
        return time_call(call, self.x.device, least_calls=self.copies)

    def time_sparse(self, threshold: float) -> Timing:
        """Time the sparse product."""
        return self.time(lambda i: self.sparse(i, threshold))

    def time_dense(self) -> Timing:
        """Time dense products, without the activation function; the faster layout counts."""
        number = len(self.weights)
        channel_major = self.time(lambda i: self.x @ self.weights[i % number])
        first = self.weights[0].t().contiguous()
        transposed = [first, *(first.clone() for _ in range(number - 1))]
        row_major = self.time(lambda i: F.linear(self.x, transposed[i % number]))
        return min(channel_major, row_major, key=lambda timing: timing.median)

    def time_floats(self) -> Timing | None:
        """Time the dense product with float weights, if the weight is quantized."""
        return None

    def _hold(self, weight: Tensor) -> None:
        """Store enough copies of a weight that no cache holds them all."""
        copies = copies_of(weight.nbytes, weight.device)
        self.weights = [weight, *(weight.clone() for _ in range(1, copies))]

    def _by_torch(self, kept: Tensor) -> Tensor:
        """Multiply with the first weight in the dtype of the kept activations."""
        return kept @ self.weights[0].to(kept.dtype)

    def _operands(self, weight: Tensor, threshold: float) -> Operands:
        output_sizes = self.shape.output_sizes
        return Operands(
            x=self.x,
            weight=weight,
            thresholds=[threshold] * len(output_sizes),
            output_sizes=output_sizes,
            activation=ACTIVATION if self.shape.form == "gated" else None,
            tuning=self.tuning,
        )

    def _finish(self, product: Tensor) -> Tensor:
        if self.shape.form == "gated":
            return reference.gate_and_up(product, ACTIVATION)
        return product


class Baseline(Protocol):
    """Kernels of another library."""

    def time(self, product: Product, threshold: float, sparsity: float) -> Timing | None:
        """Time the same product; `None` if there is no kernel for it."""
        ...


def measure(
    product: Product,
    sparsities: Sequence[float],
    bandwidth: float,
    baseline: Baseline | None = None,
) -> Iterator[GemvResult]:
    """Time one product at several sparsities, each after a check of its result.

    Args:
        product: Shape and inputs.
        sparsities: Targets in [0, 1).
        bandwidth: Bytes per second that memory can deliver.
        baseline: Kernels to time as well.

    Yields:
        One result per sparsity.

    Raises:
        UserError: A product is wrong.
    """
    dense, floats = product.time_dense(), product.time_floats()
    for sparsity in sparsities:
        threshold = product.threshold(sparsity)
        error = product.check(threshold)
        sparse = product.time_sparse(threshold)
        read = float(reference.keep_mask(product.x, threshold).any(dim=0).float().mean())
        read_bytes = product.read_bytes(read)
        yield GemvResult(
            shape=product.shape,
            dtype=str(product.x.dtype).removeprefix("torch."),
            rows=len(product.x),
            sparsity=sparsity,
            read=read,
            error=error,
            dense=dense,
            sparse=sparse,
            baseline=None if baseline is None else baseline.time(product, threshold, sparsity),
            limit=read_bytes / bandwidth * 1e6,
            bandwidth=read_bytes / (sparse.median * 1e-6),
            format=product.format,
            floats=floats,
        )


def copies_of(nbytes: int, device: torch.device) -> int:
    """Return how many copies of a weight it takes to exceed every cache.

    Args:
        nbytes: Bytes of one weight.
        device: Device that holds them.
    """
    return max(2, math.ceil(_ROTATION_BYTES[device.type] / nbytes))


def _error(product: Tensor, exact: Tensor) -> float:
    difference = product.double() - exact
    return float(difference.square().mean().sqrt() / exact.square().mean().sqrt())
