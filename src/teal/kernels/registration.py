"""How operations become known to torch."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Implementation = Callable[..., Tensor]

# What the schemas of all products end with.
VECTORS = "Tensor? score_scale=None, Tensor? shift=None, Tensor? bias=None"
NORM = "Tensor? norm_weight=None, float eps=0.0"


def registered(
    kind: str,
    schemas: Sequence[str],
    implementations: Mapping[str, Mapping[str, Implementation]],
    fakes: Mapping[str, Implementation],
) -> torch.library.Library:
    """Define operations in the namespace "teal".

    Args:
        kind: "DEF" once, and "FRAGMENT" for further operations.
        schemas: What they are given and return.
        implementations: Who computes them, by dispatch key of torch and name.
        fakes: What tells their shapes, by name.

    Returns:
        What the registration lives as long as.
    """
    library = torch.library.Library("teal", kind)  # type: ignore[no-untyped-call]
    for schema in schemas:
        library.define(schema)  # type: ignore[no-untyped-call]
    for key, by_name in implementations.items():
        for name, implementation in by_name.items():
            library.impl(name, implementation, key)  # type: ignore[no-untyped-call]
    for name, fake in fakes.items():
        torch.library.register_fake(f"teal::{name}", fake, lib=library)
    return library
