"""Search for the fastest tile configuration: random draws, then neighbours of the best."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import compress
from random import Random

from teal.kernels.cuda.nvrtc import Kernel
from teal.kernels.cuda.tile_config import TileConfig

_LEAST_THREADS = 64
# Of a multiprocessor.
_REGISTERS, _MOST_THREADS = 65536, 2048
# Of a thread, beside what it holds of weight rows and sums.
_OTHER_REGISTERS = 36
# Of weight rows that a thread has under way: fewer leave memory idle.
_LEAST_BYTES = 16

# Of a warp, while it lists.
_EARLY = (0, 1, 2, 4, 8, 16)

_DRAWN, _NEIGHBOURS = 40, 24
_ROUNDS = 3
_PARENTS = 5


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """What a thread may have, and how many warps share the channels."""

    per_lane: Sequence[int]
    warps_k: Sequence[int]
    unrolls: Sequence[int]
    sums: int  # of a column
    most_bytes: int  # of weight rows under way: more take too many registers


_ONE_ROW = {
    bits: _Choices(
        per_lane=per_lane,
        warps_k=(2, 4, 8, 8, 12, 16),
        # Not powers of two only: as many as a warp keeps on average, and some more, are one round.
        unrolls=(2, 4, 4, 6, 8, 8, 10, 12, 16, 20),
        sums=1,
        most_bytes=160,
    )
    for bits, per_lane in {16: (4, 8, 8), 8: (8, 16), 4: (8, 16, 32)}.items()
}
# They fill operands of tensor cores, whose sums are of eight rows.
_SEVERAL_ROWS = _Choices(
    per_lane=(2, 4, 4, 8), warps_k=(2, 4, 4, 6, 8), unrolls=(16, 16, 32), sums=8, most_bytes=256
)


@dataclass(frozen=True, kw_only=True)
class TileConfigSpace:
    """Cuts that are worth a try.

    Attributes:
        bits: Of a weight or code.
        chunks: Channels of a block.
        clusters: Blocks that work together.
        warps_n: Warps beside each other.
        most_threads: Of a block.
        rows: Of activations, multiplied at once.
    """

    bits: int
    chunks: Sequence[int]
    clusters: Sequence[int]
    warps_n: Sequence[int]
    most_threads: int
    rows: int = 1

    def draw(self, random: Random) -> TileConfig:
        """Return one of them."""
        choices = self._choices
        while True:
            config = TileConfig(
                chunk=random.choice(self.chunks),
                per_lane=random.choice(choices.per_lane),
                warps_n=random.choice(self.warps_n),
                warps_k=random.choice(choices.warps_k),
                unroll=random.choice(choices.unrolls),
                blocks=1,
                cluster=random.choice(self.clusters),
                depth=random.choice((1, 1, 2)),
                early=random.choice(_EARLY),
            )
            config = replace(
                config, blocks=max(1, self._most_blocks(config) + random.choice((-1, 0, 0, 1)))
            )
            if self.holds(config):
                return config

    def near(self, config: TileConfig, random: Random) -> TileConfig:
        """Return one that differs from `config` in one or two respects."""
        names = [field.name for field in fields(TileConfig)]
        while True:
            other = self.draw(random)
            changed = random.sample(names, random.choice((1, 2)))
            near = replace(config, **{name: getattr(other, name) for name in changed})
            if near != config and self.holds(near):
                return near

    def holds(self, config: TileConfig) -> bool:
        """Tell whether a config is one of them."""
        return (
            _LEAST_THREADS <= config.threads <= self.most_threads
            and config.blocks <= max(1, self._most_blocks(config)) + 1
            and config.threads * config.blocks <= _MOST_THREADS
            and _LEAST_BYTES <= self._bytes_under_way(config) <= self._choices.most_bytes
        )

    @property
    def _choices(self) -> _Choices:
        return _ONE_ROW[self.bits] if self.rows == 1 else _SEVERAL_ROWS

    def _most_blocks(self, config: TileConfig) -> int:
        sums = config.per_lane * self._choices.sums
        registers = _OTHER_REGISTERS + sums + self._bytes_under_way(config) // 4
        return min(_REGISTERS // registers, _MOST_THREADS) // config.threads

    def _bytes_under_way(self, config: TileConfig) -> int:
        return config.unroll * config.depth * config.per_lane * self.bits // 8


@dataclass(frozen=True, kw_only=True)
class Found:
    """The fastest config of a search.

    Attributes:
        config: It.
        microseconds: What it takes, mean of two measurements.
        known_microseconds: What the config takes that was known before.
    """

    config: TileConfig
    microseconds: float
    known_microseconds: float

    def __str__(self) -> str:
        return f"{self.known_microseconds:.1f} → {self.microseconds:.1f} µs: {self.config}"


def fastest(
    space: TileConfigSpace,
    known: TileConfig,
    compile_config: Callable[[TileConfig], Kernel],
    time_config: Callable[[TileConfig], float],
    seed: int = 0,
) -> Found:
    """Search the fastest config.

    A config that is not `known` may be one that does not compile, or that takes more of the GPU
    than there is: it is left out where a call raises `RuntimeError`, or where registers spill.

    Args:
        space: What is tried.
        known: A config that computes, tried too.
        compile_config: Returns a kernel; called for several configs side by side.
        time_config: Returns microseconds; called for one config after the other.
        seed: Of the draws.
    """
    random = Random(seed)
    times = {known: time_config(known)}

    def measure(configs: Iterable[TileConfig]) -> None:
        new = [config for config in dict.fromkeys(configs) if config not in times]
        times.update(_times_of(new, compile_config, time_config))

    measure(space.draw(random) for _ in range(_DRAWN))
    for _ in range(_ROUNDS):
        parents = _best_of(times)
        measure(space.near(random.choice(parents), random) for _ in range(_NEIGHBOURS))
    # The first of many is partly the luckiest: the best are measured again.
    again = {
        config: (times[config] + time_config(config)) / 2 for config in {*_best_of(times), known}
    }
    best = min(again, key=lambda config: again[config])
    return Found(config=best, microseconds=again[best], known_microseconds=again[known])


def _best_of(times: Mapping[TileConfig, float]) -> list[TileConfig]:
    return sorted(times, key=lambda config: times[config])[:_PARENTS]


def _times_of(
    configs: Sequence[TileConfig],
    compile_config: Callable[[TileConfig], Kernel],
    time_config: Callable[[TileConfig], float],
) -> dict[TileConfig, float]:
    def holds(config: TileConfig) -> bool:
        """Tell whether the kernel of a config compiles, and registers hold what threads have."""
        try:
            return compile_config(config).local_bytes == 0
        except RuntimeError:
            return False

    with ThreadPoolExecutor() as pool:
        usable = list(compress(configs, pool.map(holds, configs)))
    times = {}
    for config in usable:
        with suppress(RuntimeError):
            times[config] = time_config(config)
    return times
