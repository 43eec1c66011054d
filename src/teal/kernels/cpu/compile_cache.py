"""Compiles CPU kernels and keeps their machine code on disk, keyed by all sources of this package.

numba's own cache notices a change only in the file of the function that it compiles, but machine
code holds what it inlines from other files too.
"""

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import numba

try:
    from numba.core.caching import IndexDataCacheFile
except ImportError:
    IndexDataCacheFile = None

_log = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(
    *, parallel: bool = False, fuse: bool = False, reorder: bool = False
) -> Callable[[Function], Function]:
    """Return a decorator that compiles a function with numba on its first call.

    Machine code is loaded from disk where the same sources have been compiled before, by any
    process. Where no folder is writable, it is compiled anew and a warning says so.

    Args:
        parallel: Let `prange` loops use threads.
        fuse: Allow fused multiply-add. NaN and inf keep their meaning.
        reorder: Allow fused multiply-add, and sums in whatever order is fastest; the order is
            fixed when the function is compiled.

    Returns:
        The decorator. The function releases the interpreter lock while it runs.
    """
    freedom = {"contract", "reassoc"} if reorder else {"contract"} if fuse else False
    # Division by zero gives inf, as in torch: checks for it would keep loops from being vectorized.
    options = {
        "parallel": parallel,
        "fastmath": freedom,
        "nogil": True,
        "error_model": "numpy",
    }

    def decorate(function: Function) -> Function:
        machine_code: Function
        try:
            machine_code = numba.njit(cache=True, **options)(function)
        except RuntimeError:
            _warn_about_cache()
            machine_code = numba.njit(**options)(function)
        else:
            _key_by_all_sources(machine_code)
        return machine_code

    return decorate


def _key_by_all_sources(dispatcher: Any) -> None:
    """Let the cache of a dispatcher hold only what was compiled from the sources as they are.

    Changes nothing if numba's cache is built differently: it then notices changes less well, but
    works.
    """
    # These attributes are private, so a later numba may raise anything here.
    try:
        own = dispatcher._cache
        own._cache_file = IndexDataCacheFile(
            cache_path=own.cache_path,
            filename_base=own._impl.filename_base,
            source_stamp=(own._impl.locator.get_source_stamp(), sources_digest()),
        )
    except Exception as error:
        _log.debug("Compiled CPU kernels are keyed by the file of each function only: %s", error)


@cache
def sources_digest() -> str:
    """Return a digest of the names and contents of all Python files of this package."""
    digest = hashlib.sha256()
    sources = (file for file in files(__package__).iterdir() if file.name.endswith(".py"))
    for file in sorted(sources, key=lambda file: file.name):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


@cache
def _warn_about_cache() -> None:
    _log.warning(
        "Compiled CPU kernels cannot be kept: no writable folder. Every process compiles them "
        "anew, which takes seconds. Set NUMBA_CACHE_DIR to a writable folder."
    )
