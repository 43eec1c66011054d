"""Breaks the time of one decode step down by kernel."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from teal.engine.decoder import Decoder
from teal.engine.fused_step import stepper_of
from teal.engine.kv_cache import KeyValueCache

_WARM_UP = 3
_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """Share of one kernel in a decode step.

    Attributes:
        name: Kernel on a GPU, operation on a CPU.
        calls: Calls per step.
        microseconds: Time of all calls of a step.
    """

    name: str
    calls: float
    microseconds: float


@torch.inference_mode()
def profile_step(decoder: Decoder, prompt: Sequence[int], capacity: int) -> list[KernelTime]:
    """Profile a few decode steps, without a CUDA graph and without overlapping launches.

    Args:
        decoder: A dense or sparse decoder.
        prompt: Token ids of the prompt.
        capacity: Tokens that the cache holds.

    Returns:
        Kernels, slowest first.
    """
    device = decoder.weights.device
    is_cuda = device.type == "cuda"
    dtype = decoder.weights.embedding.dtype
    cache = KeyValueCache(decoder.architecture, 1, capacity, dtype, device)
    decoder.prefill(torch.tensor(prompt), cache)
    token = torch.zeros(1, dtype=torch.int64, device=device)
    step = stepper_of(decoder, cache, overlap=False)
    for _ in range(_WARM_UP):
        step(token, cache)
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(_STEPS):
            step(token, cache)
        if is_cuda:
            torch.cuda.synchronize(device)
    times = [
        KernelTime(
            name=event.key,
            calls=event.count / _STEPS,
            microseconds=(event.self_device_time_total if is_cuda else event.self_cpu_time_total)
            / _STEPS,
        )
        for event in profiler.key_averages()
    ]
    return sorted((row for row in times if row.microseconds), key=lambda row: -row.microseconds)
