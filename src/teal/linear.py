"""The module that takes the place of a projection and drops part of its input."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal.kernels.reference.matmul import keep_mask, sparse_activation
from teal.methods import MaskRule

# Up to this many token rows are a decode step, whatever shape they come in: a packed batch of
# eight one-token requests is (1, 8, hidden_size). More rows leave too few channels that every
# row drops (paper, section 5.4).
DECODE_ROWS = 8


class TokenSelection:
    """Which tokens of the current forward pass are sparse; shared by a model's sparse linears.

    Attributes:
        sparse_from: Fraction of a sequence after which its tokens are sparse in a forward pass of
            many tokens: 0 is every token, 1 none.
        mask: Sparse tokens of the pass under way, (batch, tokens), bool, where padding makes them
            differ between sequences; `None` where the shape alone tells.
    """

    def __init__(self, sparse_from: float) -> None:
        self.sparse_from = sparse_from
        self.mask: Tensor | None = None

    def of(self, x: Tensor) -> Tensor | bool:
        """Return the sparse tokens of `x`.

        Args:
            x: Activations, (..., tokens, in_features).

        Returns:
            Bool mask, (..., tokens), or one bool where all tokens are alike.
        """
        shape = x.shape[:-1]
        if shape.numel() <= DECODE_ROWS or self.sparse_from == 0.0:
            return True
        if self.sparse_from == 1.0:
            return False
        if self.mask is not None and self.mask.shape == shape:
            return self.mask
        positions = torch.arange(shape[-1], device=x.device)
        return (positions >= first_sparse(shape[-1], self.sparse_from)).expand(shape)


class SparsityMeter:
    """Counts how many activations of one projection were dropped."""

    def __init__(self) -> None:
        self._dropped: Tensor | int = 0
        self._seen = 0

    def add(self, keep: Tensor) -> None:
        """Count one mask, (rows, in_features), True = kept."""
        self._dropped = self._dropped + (~keep).sum()
        self._seen += keep.numel()

    @property
    def sparsity(self) -> float:
        """Effective sparsity over everything counted; 0 where nothing was."""
        return float(self._dropped) / self._seen if self._seen else 0.0


class SparseLinear(nn.Module):
    """An `nn.Linear` whose input loses the entries that a rule drops.

    It holds the very parameters of the linear layer that it replaces, under the same names.

    Attributes:
        rule: What is dropped, or `None` for nothing; may be exchanged at any time.
        selection: Which tokens are sparse.
        meter: Counts dropped activations where set.
    """

    def __init__(self, linear: nn.Linear, rule: MaskRule | None, selection: TokenSelection) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        # In a tuple, which nn.Module does not register: its parameters are listed once.
        self._replaced = (linear,)
        self.rule = rule
        self.selection = selection
        self.meter: SparsityMeter | None = None

    @property
    def replaced(self) -> nn.Linear:
        """The linear layer that this one stands in for."""
        return self._replaced[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of the kept activations with the weight.

        Args:
            x: Activations, (..., in_features).

        Returns:
            (..., out_features), in the dtype of `x`.
        """
        return F.linear(self._drop(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Show sizes and threshold in the printed model."""
        threshold = "none" if self.rule is None else f"{self.rule.threshold:.4g}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, threshold={threshold}"
        )

    def _drop(self, x: Tensor) -> Tensor:
        tokens = self.selection.of(x)
        if self.rule is None or tokens is False:
            return x
        vectors = {kind: vector.to(x.device) for kind, vector in self.rule.vectors.items()}
        if self.meter is not None:
            keep = keep_mask(x, self.rule.threshold, **vectors)
            self.meter.add(keep if tokens is True else keep[tokens])
        sparse = sparse_activation(x, self.rule.threshold, **vectors)
        return sparse if tokens is True else torch.where(tokens.unsqueeze(-1), sparse, x)


def first_sparse(length: int, sparse_from: float) -> int:
    """Return the first sparse position in a sequence of `length` tokens."""
    return math.ceil(sparse_from * length)
