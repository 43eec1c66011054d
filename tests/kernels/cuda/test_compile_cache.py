from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("cuda.bindings")

from cuda.bindings import nvrtc

from teal.kernels.cuda import compile_cache, embed_argmax
from teal.kernels.cuda.compile_cache import kept
from teal.kernels.cuda.nvrtc import compiled


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    pytest.importorskip("cuda.core")
    monkeypatch.setattr(compile_cache, "user_cache_path", lambda name: tmp_path / name)
    _begin_again()
    yield tmp_path
    _begin_again()


def _begin_again() -> None:
    """Forget what only this process knows."""
    compile_cache._cache.cache_clear()
    compiled.cache_clear()


def _never() -> bytes:
    raise AssertionError("it is compiled again")


def _returns(result: bytes) -> Callable[[], bytes]:
    return lambda: result


def test_another_process_reads_the_compiled_kernel() -> None:
    assert kept([b"source", b"header"], _returns(b"cubin")) == b"cubin"
    _begin_again()
    assert kept([b"source", b"header"], _never) == b"cubin"


@pytest.mark.parametrize("inputs", [[b"source"], [b"sourcehead", b"er"], [b"header", b"source"]])
def test_other_inputs_are_compiled(inputs: list[bytes]) -> None:
    kept([b"source", b"header"], _returns(b"cubin"))
    assert kept(inputs, _returns(b"other")) == b"other"


def test_kernels_are_compiled_every_time_if_the_cache_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "teal").write_text("a file where the folder would be")
    assert kept([b"source"], _returns(b"first")) == b"first"
    assert kept([b"source"], _returns(b"second")) == b"second"


def test_kernels_are_compiled_every_time_without_the_cache_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compile_cache, "FileStreamProgramCache", None)
    assert kept([b"source"], _returns(b"first")) == b"first"
    assert kept([b"source"], _returns(b"second")) == b"second"


def test_a_failed_compilation_is_not_kept() -> None:
    with pytest.raises(AssertionError):
        kept([b"source"], _never)
    assert kept([b"source"], _returns(b"cubin")) == b"cubin"


def test_a_kernel_is_compiled_once_for_each_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bfloat16, float16 = map(embed_argmax.embed_argmax_config, (torch.bfloat16, torch.float16))
    first = compiled(embed_argmax.SOURCE, bfloat16, "sm_90")
    calls: list[object] = []
    compile_program = nvrtc.nvrtcCompileProgram
    monkeypatch.setattr(
        nvrtc,
        "nvrtcCompileProgram",
        lambda *arguments: calls.append(1) or compile_program(*arguments),
    )
    _begin_again()
    assert compiled(embed_argmax.SOURCE, bfloat16, "sm_90") == first
    assert not calls
    assert compiled(embed_argmax.SOURCE, float16, "sm_90") != first
    assert len(calls) == 1
