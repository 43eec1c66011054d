"""Keeps compiled CUDA kernels on disk, so that other processes need not compile them again.

NVIDIA's cuda-core does it, if it is installed: files are written whole or not at all, shared by any
number of processes, and deleted when they have not been read for longest.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress

try:
    from cuda.core.utils import FileStreamProgramCache
    from platformdirs import user_cache_path
except ImportError:
    FileStreamProgramCache = None

# Thousands of kernels; a model needs a dozen.
_MOST_BYTES = 1 << 28


def kept(inputs: Sequence[object], compile: Callable[[], bytes]) -> bytes:
    """Return the result of `compile`, now or earlier for the same inputs, in any process.

    Without a cache it always compiles.

    Args:
        inputs: Everything that the result depends on; they are equal if their `repr` is.
        compile: Makes the result.
    """
    cache = _cache()
    if cache is None:
        return compile()
    key = hashlib.sha256(repr(inputs).encode()).digest()
    found: bytes | None = None
    with suppress(OSError):
        found = cache.get(key)
    if found is None:
        found = compile()
        with suppress(OSError):
            cache[key] = found
    return found


@functools.cache
def _cache() -> "FileStreamProgramCache | None":
    if FileStreamProgramCache is None:
        return None
    try:
        return FileStreamProgramCache(
            user_cache_path("teal") / "kernels", max_size_bytes=_MOST_BYTES
        )
    except OSError:
        # Nobody may write there.
        return None
