import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba")

import numba

import teal
from teal.kernels.cpu import compile_cache
from teal.kernels.cpu.compile_cache import compiled, sources_digest

# Code in gemv_kernel.py that holds a constant of simd.py: prints it, cache hits and cache misses.
LINES_OF_CODE = """
import numpy as np
from teal.kernels.cpu.gemv_kernel import _per_line

entries = _per_line(np.zeros(4, np.uint16))
print(entries, _per_line.stats.cache_hits.total(), _per_line.stats.cache_misses.total())
"""


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def _increment(number: int) -> int:
    return number + 1


def _compiled() -> Any:
    return compiled()(_increment)


def _run(folder: Path) -> list[int]:
    """Run the code with the sources in a folder; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(folder / "kept")}
    command = [sys.executable, "-c", LINES_OF_CODE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [int(number) for number in run.stdout.split()]


def test_code_is_loaded_from_disk_until_another_file_of_the_kernels_changes(
    tmp_path: Path,
) -> None:
    sources = Path(teal.__file__).parent
    shutil.copytree(sources, tmp_path / "teal", ignore=shutil.ignore_patterns("__pycache__"))
    simd = tmp_path / "teal/kernels/cpu/simd.py"
    assert _run(tmp_path) == [32, 0, 1]
    # Only contents count, not when they were written.
    os.utime(simd, (1, 1))
    assert _run(tmp_path) == [32, 1, 0]
    simd.write_text(simd.read_text().replace("LINE_BYTES = 64", "LINE_BYTES = 128"))
    assert _run(tmp_path) == [64, 0, 1]
    assert _run(tmp_path) == [64, 1, 0]


def test_a_second_compilation_of_the_same_sources_loads_from_the_folder_that_numba_is_told(
    cache_folder: Path,
) -> None:
    first, second = _compiled(), _compiled()
    assert first(1) == second(1) == 2
    assert first.stats.cache_misses.total() == second.stats.cache_hits.total() == 1
    assert Path(second.stats.cache_path).parent == cache_folder


def test_other_sources_are_compiled_anew(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _compiled()(1) == 2
    monkeypatch.setattr(compile_cache, "sources_digest", lambda: "other")
    other = _compiled()
    assert other(1) == 2
    assert (other.stats.cache_hits.total(), other.stats.cache_misses.total()) == (0, 1)


@pytest.mark.parametrize("hook", [None, lambda: None], ids=["is gone", "takes other arguments"])
def test_numba_keeps_code_as_usual_if_a_private_part_of_its_cache(
    hook: object, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_cache, "IndexDataCacheFile", hook)
    first, second = _compiled(), _compiled()
    assert first(1) == second(1) == 2
    assert second.stats.cache_hits.total() == 1


def test_without_compilation_functions_run_as_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert _compiled()(1) == 2


def test_a_function_that_cannot_be_cached_is_compiled_all_the_same_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compile_cache._warn_about_cache.cache_clear()
    # Code without a file has no folder for its cache either.
    code = compile("lambda a: a + 1", "<nowhere>", "eval")
    for _ in range(2):
        increment = types.FunctionType(code.co_consts[0], {})
        assert compiled()(increment)(1) == 2
    assert caplog.text.count("NUMBA_CACHE_DIR") == 1


def test_digest_changes_with_every_name_and_content_of_a_source_and_with_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_cache, "files", lambda package: tmp_path)
    source = tmp_path / "a.py"
    source.write_text("1")
    digests = [sources_digest.__wrapped__()]
    (tmp_path / "a.nbi").write_text("compiled")
    assert sources_digest.__wrapped__() == digests[0]
    for change in (
        lambda: source.write_text("2"),
        lambda: (tmp_path / "b.py").write_text(""),
        lambda: source.rename(tmp_path / "c.py"),
    ):
        change()
        digests.append(sources_digest.__wrapped__())
    assert len(set(digests)) == 4
