from random import Random

import pytest

pytest.importorskip("cuda.bindings")

from teal.benchmark.tuning.search import CutSpace, fastest
from teal.kernels.cuda.nvrtc import Kernel
from teal.kernels.cuda.tile_config import Cut

KNOWN = Cut(chunk=256, warps_n=1, warps_k=8, unroll=4, blocks=3)


def space(bits: int = 16) -> CutSpace:
    return CutSpace(
        bits=bits, chunks=(128, 256, 512), clusters=(1,), warps_n=(1, 2), most_threads=512
    )


def accept(cut: Cut) -> Kernel:
    return Kernel(cut, shared_bytes=0)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_is_tried_fits_into_a_multiprocessor(bits: int) -> None:
    random = Random(1)
    drawn = [space(bits).draw(random) for _ in range(200)]
    near = [space(bits).near(cut, random) for cut in drawn]
    for cut in (*drawn, *near):
        assert space(bits).holds(cut)
        assert cut.threads <= 512 and cut.threads * cut.blocks <= 2048
        # More would leave a thread no registers for its strips.
        registers = 65536 // (cut.threads * cut.blocks)
        under_way = cut.unroll * cut.depth * cut.per_lane * bits // 32
        assert cut.blocks <= 2 or registers >= under_way
    assert len(set(drawn)) > 100
    assert all(cut != other for cut, other in zip(drawn, near, strict=True))


def test_the_search_comes_near_to_the_best() -> None:
    def time(cut: Cut) -> float:
        return abs(cut.warps_k - 8) + abs(cut.unroll - 8) + 10 * (cut.chunk != 512) + cut.warps_n

    found = fastest(space(), KNOWN, accept, time)
    assert time(found.cut) <= 1 + time(Cut(chunk=512, warps_n=1, warps_k=8, unroll=8, blocks=1))


def test_cuts_that_do_not_compile_or_spill_or_run_are_left_out() -> None:
    def compile_cut(cut: Cut) -> Kernel:
        if cut.unroll == 8:
            raise RuntimeError("does not compile")
        return Kernel(cut, shared_bytes=0, local_bytes=8 * (cut.warps_n == 1))

    def time(cut: Cut) -> float:
        assert cut == KNOWN or cut.warps_n == 2
        if cut.depth == 2:
            raise RuntimeError("does not run")
        return 1.0 if cut.unroll == 4 else 2.0

    found = fastest(space(), KNOWN, compile_cut, time)
    assert (found.cut.unroll, found.cut.depth) == (4, 1)


def test_what_is_known_has_to_compute() -> None:
    def time(cut: Cut) -> float:
        raise RuntimeError(f"no {cut}")

    with pytest.raises(RuntimeError, match="no Cut"):
        fastest(space(), KNOWN, accept, time)


def test_the_luckiest_of_many_has_to_be_fast_again() -> None:
    calls: dict[Cut, int] = {}

    def time(cut: Cut) -> float:
        calls[cut] = calls.get(cut, 0) + 1
        is_lucky = cut.chunk == 128 and calls[cut] == 1
        return 0.5 if is_lucky else 10.0 if cut.chunk == 128 else 1.0 + cut.warps_n

    found = fastest(space(), KNOWN, accept, time)
    assert max(calls.values()) == 2
    assert calls[found.cut] == 2
    assert (found.microseconds, found.known_microseconds) == (2.0, 2.0)
    assert str(found).startswith("2.0 → 2.0 µs: Cut(")
