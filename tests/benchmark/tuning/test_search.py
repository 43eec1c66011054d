from random import Random

import pytest

pytest.importorskip("cuda.bindings")

from teal.benchmark.tuning.search import TileConfigSpace, fastest
from teal.kernels.cuda.nvrtc import Kernel
from teal.kernels.cuda.tile_config import TileConfig

KNOWN = TileConfig(chunk=256, warps_n=1, warps_k=8, unroll=4, blocks=3)


def space(bits: int = 16) -> TileConfigSpace:
    return TileConfigSpace(
        bits=bits, chunks=(128, 256, 512), clusters=(1,), warps_n=(1, 2), most_threads=512
    )


def accept(config: TileConfig) -> Kernel:
    return Kernel(config, shared_bytes=0)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_candidates_fit_into_a_multiprocessor(bits: int) -> None:
    random = Random(1)
    drawn = [space(bits).draw(random) for _ in range(200)]
    near = [space(bits).near(config, random) for config in drawn]
    for config in (*drawn, *near):
        assert space(bits).holds(config)
        assert config.threads <= 512 and config.threads * config.blocks <= 2048
        # More would leave a thread no registers for its weight rows.
        registers = 65536 // (config.threads * config.blocks)
        under_way = config.unroll * config.depth * config.per_lane * bits // 32
        assert config.blocks <= 2 or registers >= under_way
    assert len(set(drawn)) > 100
    assert all(config != other for config, other in zip(drawn, near, strict=True))


def test_search_comes_close_to_the_best() -> None:
    def time(config: TileConfig) -> float:
        return (
            abs(config.warps_k - 8)
            + abs(config.unroll - 8)
            + 10 * (config.chunk != 512)
            + config.warps_n
        )

    found = fastest(space(), KNOWN, accept, time)
    assert time(found.config) <= 1 + time(
        TileConfig(chunk=512, warps_n=1, warps_k=8, unroll=8, blocks=1)
    )


def test_candidates_that_do_not_compile_or_launch_or_that_spill_are_left_out() -> None:
    def compile_config(config: TileConfig) -> Kernel:
        if config.unroll == 8:
            raise RuntimeError("does not compile")
        return Kernel(config, shared_bytes=0, local_bytes=8 * (config.warps_n == 1))

    def time(config: TileConfig) -> float:
        assert config == KNOWN or config.warps_n == 2
        if config.depth == 2:
            raise RuntimeError("does not run")
        return 1.0 if config.unroll == 4 else 2.0

    found = fastest(space(), KNOWN, compile_config, time)
    assert (found.config.unroll, found.config.depth) == (4, 1)


def test_known_configuration_has_to_run() -> None:
    def time(config: TileConfig) -> float:
        raise RuntimeError(f"no {config}")

    with pytest.raises(RuntimeError, match="no TileConfig"):
        fastest(space(), KNOWN, accept, time)


def test_best_candidates_are_measured_twice() -> None:
    calls: dict[TileConfig, int] = {}

    def time(config: TileConfig) -> float:
        calls[config] = calls.get(config, 0) + 1
        is_lucky = config.chunk == 128 and calls[config] == 1
        return 0.5 if is_lucky else 10.0 if config.chunk == 128 else 1.0 + config.warps_n

    found = fastest(space(), KNOWN, accept, time)
    assert max(calls.values()) == 2
    assert calls[found.config] == 2
    assert (found.microseconds, found.known_microseconds) == (2.0, 2.0)
    assert str(found).startswith("2.0 → 2.0 µs: TileConfig(")
