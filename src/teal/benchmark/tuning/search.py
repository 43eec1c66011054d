"""Search for the fastest tile configuration: random draws, then neighbours of the best."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import compress
from random import Random

from teal.kernels.cuda.nvrtc import Kernel
from teal.kernels.cuda.tile_config import TileConfig

# Threads per block.
_LEAST_THREADS = 64
# Per multiprocessor.
_REGISTERS, _MOST_THREADS = 65536, 2048
# Registers per thread besides those for weight rows and sums.
_OTHER_REGISTERS = 36
# Bytes of weight rows in flight per thread: fewer leave memory idle.
_LEAST_BYTES = 16

# Channels per warp whose weight rows, if kept, are loaded while the block collects kept channels.
_EARLY = (0, 1, 2, 4, 8, 16)

_DRAWN, _NEIGHBOURS = 40, 24
_ROUNDS = 3
_PARENTS = 5


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """Candidate values for one row, or for several.

    Attributes:
        per_lane: Columns per thread.
        warps_k: Warps that share the channels.
        unrolls: Weight rows per round.
        sums: Accumulators per column.
        most_bytes: Bytes of weight rows in flight per thread; more take too many registers.
    """

    per_lane: Sequence[int]
    warps_k: Sequence[int]
    unrolls: Sequence[int]
    sums: int
    most_bytes: int


_ONE_ROW = {
    bits: _Choices(
        per_lane=per_lane,
        warps_k=(2, 4, 8, 8, 12, 16),
        # Not only powers of two: the best covers what a warp keeps on average in one round.
        unrolls=(2, 4, 4, 6, 8, 8, 10, 12, 16, 20),
        sums=1,
        most_bytes=160,
    )
    for bits, per_lane in {16: (4, 8, 8), 8: (8, 16), 4: (8, 16, 32)}.items()
}
# Several rows run on tensor cores, whose accumulators hold eight rows.
_SEVERAL_ROWS = _Choices(
    per_lane=(2, 4, 4, 8), warps_k=(2, 4, 4, 6, 8), unrolls=(16, 16, 32), sums=8, most_bytes=256
)


@dataclass(frozen=True, kw_only=True)
class TileConfigSpace:
    """Tile configurations that are worth a try.

    Attributes:
        bits: Bits per weight or code.
        chunks: Channels per block.
        clusters: Blocks per cluster.
        warps_n: Warps that share the columns.
        most_threads: Threads per block at most.
        rows: Token rows multiplied at once.
    """

    bits: int
    chunks: Sequence[int]
    clusters: Sequence[int]
    warps_n: Sequence[int]
    most_threads: int
    rows: int = 1

    def draw(self, random: Random) -> TileConfig:
        """Draw a configuration at random."""
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
        """Draw a configuration that differs from `config` in one or two fields."""
        names = [field.name for field in fields(TileConfig)]
        while True:
            other = self.draw(random)
            changed = random.sample(names, random.choice((1, 2)))
            near = replace(config, **{name: getattr(other, name) for name in changed})
            if near != config and self.holds(near):
                return near

    def holds(self, config: TileConfig) -> bool:
        """Tell whether a configuration is in the space."""
        return (
            _LEAST_THREADS <= config.threads <= self.most_threads
            and config.blocks <= max(1, self._most_blocks(config)) + 1
            and config.threads * config.blocks <= _MOST_THREADS
            and _LEAST_BYTES <= self._bytes_in_flight(config) <= self._choices.most_bytes
        )

    @property
    def _choices(self) -> _Choices:
        return _ONE_ROW[self.bits] if self.rows == 1 else _SEVERAL_ROWS

    def _most_blocks(self, config: TileConfig) -> int:
        sums = config.per_lane * self._choices.sums
        registers = _OTHER_REGISTERS + sums + self._bytes_in_flight(config) // 4
        return min(_REGISTERS // registers, _MOST_THREADS) // config.threads

    def _bytes_in_flight(self, config: TileConfig) -> int:
        return config.unroll * config.depth * config.per_lane * self.bits // 8


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Result of a search.

    Attributes:
        config: The fastest configuration.
        microseconds: Its time, mean of two measurements.
        known_microseconds: Time of the configuration that the search began with.
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
) -> SearchResult:
    """Search for the fastest configuration.

    Candidates other than `known` may fail to compile, or need more resources than the GPU has. They
    are left out if a call raises `RuntimeError` or if registers spill.

    Args:
        space: Configurations to try.
        known: A configuration that runs; it takes part.
        compile_config: Returns a kernel; called from several threads.
        time_config: Returns microseconds; called for one configuration after the other.
        seed: Seed of the random draws.
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
    # The minimum of many noisy times is partly luck: the best are measured again.
    again = {
        config: (times[config] + time_config(config)) / 2 for config in {*_best_of(times), known}
    }
    best = min(again, key=lambda config: again[config])
    return SearchResult(config=best, microseconds=again[best], known_microseconds=again[known])


def _best_of(times: Mapping[TileConfig, float]) -> list[TileConfig]:
    return sorted(times, key=lambda config: times[config])[:_PARENTS]


def _times_of(
    configs: Sequence[TileConfig],
    compile_config: Callable[[TileConfig], Kernel],
    time_config: Callable[[TileConfig], float],
) -> dict[TileConfig, float]:
    def is_usable(config: TileConfig) -> bool:
        """Tell whether the kernel of a configuration compiles and spills no registers."""
        try:
            return compile_config(config).local_bytes == 0
        except RuntimeError:
            return False

    with ThreadPoolExecutor() as pool:
        usable = list(compress(configs, pool.map(is_usable, configs)))
    times = {}
    for config in usable:
        with suppress(RuntimeError):
            times[config] = time_config(config)
    return times
