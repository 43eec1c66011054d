"""The module that replaces a projection and drops part of its input."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal.kernels.reference.matmul import keep_mask, sparse_activation
from teal.methods import MaskRule

# A forward pass of up to this many token rows counts as a decode step, whatever its shape: a
# packed batch of eight one-token requests is (1, 8, hidden_size). With more rows, too few channels
# are dropped by all of them (paper, section 5.4).
DECODE_ROWS = 8


class TokenSelection:
    """Selects the sparse tokens of a forward pass; shared by all sparse linears of a model.

    Attributes:
        sparse_from: Fraction of a sequence after which its tokens are sparse in a forward pass of
            many tokens: 0 selects every token, 1 none.
        mask: Sparse tokens of the current forward pass, (batch, tokens), bool, if padding makes
            them differ between sequences; `None` if they depend on the shape alone.
    """

    def __init__(self, sparse_from: float) -> None:
        self.sparse_from = sparse_from
        self.mask: Tensor | None = None

    def of(self, x: Tensor) -> Tensor | bool:
        """Return the sparse tokens of `x`.

        Args:
            x: Activations, (..., tokens, in_features).

        Returns:
            Mask, (..., tokens), bool, or a single bool for all tokens.
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
    """Counts the dropped activations of one projection."""

    def __init__(self) -> None:
        self._dropped: Tensor | int = 0
        self._seen = 0

    def add(self, keep: Tensor) -> None:
        """Count a keep mask, (..., in_features), bool, True for kept entries."""
        self._dropped = self._dropped + (~keep).sum()
        self._seen += keep.numel()

    @property
    def sparsity(self) -> float:
        """Effective sparsity over everything counted; 0 if nothing was."""
        return float(self._dropped) / self._seen if self._seen else 0.0


class SparseLinear(nn.Module):
    """An `nn.Linear` that drops the entries of its input that a rule selects.

    It shares the parameters of the linear layer that it replaces, under the same names.

    Args:
        linear: The linear layer to replace.
        rule: Mask rule of the input.
        selection: Selection of sparse tokens, shared by all sparse linears of a model.

    Attributes:
        rule: Mask rule of the input, or `None` to drop nothing; can be set at any time.
        selection: Selection of sparse tokens.
        meter: Counter of dropped activations, or `None`.
    """

    def __init__(self, linear: nn.Linear, rule: MaskRule | None, selection: TokenSelection) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        # In a tuple, so that nn.Module does not register the same parameters twice.
        self._replaced = (linear,)
        self.rule = rule
        self.selection = selection
        self.meter: SparsityMeter | None = None

    @property
    def replaced(self) -> nn.Linear:
        """The linear layer that this one replaces."""
        return self._replaced[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of the kept activations with the weight.

        Args:
            x: Activations, (..., in_features).

        Returns:
            Product, (..., out_features), in the dtype of `x`.
        """
        return F.linear(self._drop(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return sizes and threshold for the printed model."""
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
