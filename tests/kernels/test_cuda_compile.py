import pytest

pytest.importorskip("cuda.bindings")

from teal.kernels import cuda_step
from teal.kernels.cuda_compile import can_compile, compiled


def test_kernels_compile_for_gpus_that_the_compiler_knows_and_that_have_what_they_need() -> None:
    assert can_compile((8, 0))
    assert can_compile((9, 0))
    # Known to the compiler, but without asynchronous copies and bfloat16.
    assert not can_compile((7, 5))
    assert not can_compile((3, 7))


def test_a_source_that_does_not_compile_is_shown_with_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)cuda_step.cu does not compile:\n.*CHUNK"):
        compiled(cuda_step.SOURCE, (), "sm_90")
