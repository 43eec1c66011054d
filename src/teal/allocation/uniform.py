"""Uniform allocation: the same sparsity for every projection."""

from teal.allocation.budget import AllocationRequest, target_projections


def uniform_sparsities(request: AllocationRequest) -> dict[str, float]:
    """Give every planned projection the sparsity budget of the whole model."""
    names = target_projections(request.stats, request.target_modules)
    return dict.fromkeys(names, request.sparsity)
