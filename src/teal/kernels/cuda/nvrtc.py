"""Compiles CUDA C++ at run time and launches it, through NVIDIA's Python bindings."""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

from teal.foundation.errors import UserError
from teal.kernels.cuda.compile_cache import kept
from teal.kernels.cuda.kernel_config import KernelConfig, header

# Types of kernel parameters, beside pointers.
INT = ctypes.c_int
FLOAT = ctypes.c_float
_POINTER = ctypes.c_void_p

_AMPERE, _HOPPER = (8, 0), (9, 0)

# The driver chooses.
_DEFAULT_CARVEOUT = -1

# Constant of a source: how much dynamic shared memory the host has to provide.
_SHARED_BYTES = b"shared_bytes"

Argument = torch.Tensor | tuple[Any, Any] | None


@dataclass(frozen=True)
class Kernel:
    """A kernel on a device.

    Attributes:
        handle: The driver's function.
        shared_bytes: Dynamic shared memory per block.
        local_bytes: Local memory per thread, into which registers are spilled.
    """

    handle: Any
    shared_bytes: int
    local_bytes: int = 0


@functools.cache
def can_compile(capability: tuple[int, int]) -> bool:
    """Tell whether the kernels compile for a compute capability.

    NVIDIA's run-time compiler has to be installed and to know it, and the GPU needs asynchronous
    copies and bfloat16, which came with 8.0.
    """
    try:
        known: list[int] = _checked(nvrtc.nvrtcGetSupportedArchs())
    except RuntimeError:
        # The bindings look for the library only at the first call.
        return False
    major, minor = capability
    return capability >= _AMPERE and 10 * major + minor in known


@functools.cache
def has_clusters(device: int | torch.device) -> bool:
    """Tell whether a GPU has clusters of blocks and programmatic dependent launch."""
    return torch.cuda.get_device_capability(device) >= _HOPPER


def architecture_of(device: int | torch.device) -> str:
    """Return the architecture that kernels are compiled for on a device, such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def compiled(source: str, config: KernelConfig, architecture: str) -> bytes:
    """Compile a file of this package for one architecture, or read what was compiled before.

    Args:
        source: Name of the file in `csrc/`.
        config: What it is compiled for.
        architecture: GPU architecture, such as "sm_90".

    Returns:
        A cubin.

    Raises:
        RuntimeError: The source does not compile for this configuration.
    """
    headers = {**_headers(), "config.cuh": header(config).encode()}
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    sources = [_text(source), *headers.values()]
    names = [source, *headers]
    inputs = nvrtc.nvrtcVersion(), names, sources, options
    return kept(inputs, lambda: _compile(names, sources, options))


def _compile(names: Sequence[str], sources: Sequence[bytes], options: Sequence[str]) -> bytes:
    """Compile the first of the files, which includes the others."""
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            sources[0],
            names[0].encode(),
            len(names) - 1,
            list(sources[1:]),
            [name.encode() for name in names[1:]],
        )
    )
    (status,) = nvrtc.nvrtcCompileProgram(
        program, len(options), [option.encode() for option in options]
    )
    if int(status):
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{names[0]} does not compile:\n{log.decode()}")
    cubin = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


@functools.cache
def function(
    source: str,
    name: str,
    config: KernelConfig,
    device: int,
    carveout: int = _DEFAULT_CARVEOUT,
) -> Kernel:
    """Return a kernel that is ready to be launched on a device.

    Args:
        source: Name of the file in `csrc/`.
        name: Name of the kernel.
        config: What it is compiled for.
        device: Index of the CUDA device.
        carveout: Preferred shared memory of a multiprocessor while the kernel runs, in percent of
            the most that it can have; the rest is L1 cache. By default the driver chooses.

    Raises:
        UserError: The kernel is not loaded yet, and the stream is being captured in a CUDA graph.
    """
    if torch.cuda.is_current_stream_capturing():
        raise UserError(
            f"The first call of {name} for new sizes or dtypes cannot be captured in a CUDA graph. "
            "Run it once before capturing."
        )
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        cubin = compiled(source, config, architecture_of(device))
        module = _checked(driver.cuModuleLoadData(cubin))
        handle = _checked(driver.cuModuleGetFunction(module, name.encode()))
        shared_bytes = _shared_bytes(module)
        attributes = driver.CUfunction_attribute
        preferred = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _checked(driver.cuFuncSetAttribute(handle, preferred, carveout))
        if shared_bytes:
            size = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(handle, size, shared_bytes))
        spilled = attributes.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
        local_bytes: int = _checked(driver.cuFuncGetAttribute(spilled, handle))
    return Kernel(handle, shared_bytes, local_bytes)


# The kernels of a decode step all prefer the same carve-out. To change it, a multiprocessor has to
# be idle, so the next launch could not begin on it early.
function_of_step = functools.partial(function, carveout=60)


def launch(
    kernel: Kernel,
    grid: tuple[int, int],
    threads: int,
    arguments: Sequence[Argument],
    *,
    dependent: bool,
) -> None:
    """Launch a kernel on the current stream.

    Args:
        kernel: From `function`.
        grid: Number of blocks along x and y.
        threads: Threads per block.
        arguments: Tensors for pointers, `None` for a null pointer, (value, type) for numbers.
        dependent: The launch may begin before the previous one has ended.
    """
    stream = torch.cuda.current_stream().cuda_stream
    config = _launch_config(grid, threads, kernel.shared_bytes, stream, dependent)
    values, types = zip(*map(_value_and_type, arguments), strict=True)
    _checked(driver.cuLaunchKernelEx(config, kernel.handle, (values, types), 0))


@functools.cache
def _launch_config(
    grid: tuple[int, int], threads: int, shared_bytes: int, stream: int, dependent: bool
) -> Any:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = stream
    if dependent:
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [early], 1
    return config


def _shared_bytes(module: Any) -> int:
    status, pointer, _size = driver.cuModuleGetGlobal(module, _SHARED_BYTES)
    if int(status):
        return 0
    value = ctypes.c_int()
    _checked(driver.cuMemcpyDtoH(ctypes.addressof(value), pointer, ctypes.sizeof(value)))
    return value.value


@functools.cache
def _headers() -> dict[str, bytes]:
    """Return the files that the sources include, by name."""
    names = [file.name for file in _csrc().iterdir()]
    return {name: _text(name) for name in names if name.endswith(".cuh")}


def _text(source: str) -> bytes:
    return (_csrc() / source).read_bytes()


def _csrc() -> Traversable:
    return files("teal.kernels.cuda") / "csrc"


def _value_and_type(argument: Argument) -> tuple[Any, Any]:
    if isinstance(argument, tuple):
        return argument
    return 0 if argument is None else argument.data_ptr(), _POINTER


def _checked(result: tuple[Any, ...]) -> Any:
    """Return what a call of the bindings returned after its status."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA reported {status!r}.")
    return values[0] if values else None
