"""Compiles CUDA C++ at run time and launches it, through NVIDIA's own bindings."""

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

# What a kernel parameter can be, beside pointers.
INT = ctypes.c_int
FLOAT = ctypes.c_float
_POINTER = ctypes.c_void_p

_AMPERE, _HOPPER = (8, 0), (9, 0)

_CHOICE_OF_DRIVER = -1

# Constant of a source that says how much shared memory the host has to provide.
_SHARED_BYTES = b"shared_bytes"

Definitions = tuple[tuple[str, int | str], ...]
Argument = torch.Tensor | tuple[Any, Any] | None


@dataclass(frozen=True)
class Kernel:
    """A kernel on a device.

    Attributes:
        handle: Of the driver.
        shared_bytes: Shared memory of a block, beside what is in the kernel's own declaration.
        local_bytes: Of a thread, where what registers do not hold is spilled to.
    """

    handle: Any
    shared_bytes: int
    local_bytes: int = 0


@functools.cache
def can_compile(capability: tuple[int, int]) -> bool:
    """Tell whether the kernels compile for a compute capability.

    That takes NVIDIA's run-time compiler, which has to know it, and asynchronous copies and
    bfloat16, which came with 8.0.
    """
    try:
        known: list[int] = _checked(nvrtc.nvrtcGetSupportedArchs())
    except RuntimeError:
        # The bindings look for the library at the first call.
        return False
    major, minor = capability
    return capability >= _AMPERE and 10 * major + minor in known


@functools.cache
def has_clusters(device: int | torch.device) -> bool:
    """Tell whether a GPU has clusters of blocks and launches that begin early."""
    return torch.cuda.get_device_capability(device) >= _HOPPER


def architecture_of(device: int | torch.device) -> str:
    """Return what kernels are compiled for to run on a device, such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def compiled(source: str, definitions: Definitions, architecture: str) -> bytes:
    """Compile a file of this package for one architecture, or read what was compiled before.

    Args:
        source: Name of the file in `csrc/`.
        definitions: Macros and their values.
        architecture: Such as "sm_90".

    Returns:
        A cubin.
    """
    headers = _headers()
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in definitions]
    sources = [_text(source), *headers.values()]
    names = [source, *headers]
    inputs = nvrtc.nvrtcVersion(), names, sources, options
    return kept(inputs, lambda: _compile(names, sources, options))


def _compile(names: Sequence[str], sources: Sequence[bytes], options: Sequence[str]) -> bytes:
    """Compile the first of some files, which includes the others."""
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
    definitions: Definitions,
    device: int,
    shared_percent: int = _CHOICE_OF_DRIVER,
) -> Kernel:
    """Return a kernel that is ready to be launched on a device.

    Args:
        source: As `compiled`.
        name: Name of the kernel.
        definitions: As `compiled`.
        device: Index of the CUDA device.
        shared_percent: Shared memory of a multiprocessor while the kernel runs, of the most that it
            can have; the rest is first-level cache. By default the driver chooses.

    Raises:
        UserError: It is not loaded yet, and loading cannot be captured in a CUDA graph.
    """
    if torch.cuda.is_current_stream_capturing():
        raise UserError(
            f"The first call of {name} for new sizes or dtypes cannot be captured in a CUDA graph. "
            "Run it once before capturing."
        )
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        cubin = compiled(source, definitions, architecture_of(device))
        module = _checked(driver.cuModuleLoadData(cubin))
        handle = _checked(driver.cuModuleGetFunction(module, name.encode()))
        shared_bytes = _shared_bytes(module)
        attributes = driver.CUfunction_attribute
        split = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _checked(driver.cuFuncSetAttribute(handle, split, shared_percent))
        if shared_bytes:
            size = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(handle, size, shared_bytes))
        spilled = attributes.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
        local_bytes: int = _checked(driver.cuFuncGetAttribute(spilled, handle))
    return Kernel(handle, shared_bytes, local_bytes)


# The kernels of a step divide the memory of a multiprocessor alike: to divide it otherwise, one
# waits until it is empty, and the next launch cannot begin on it before.
function_of_step = functools.partial(function, shared_percent=60)


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
        grid: Blocks.
        threads: Threads of a block.
        arguments: Tensors for pointers, `None` for a null pointer, (value, type) for numbers.
        dependent: The launch may begin before the one in front has ended.
    """
    stream = torch.cuda.current_stream().cuda_stream
    config = _config(grid, threads, kernel.shared_bytes, stream, dependent)
    values, types = zip(*map(_value_and_type, arguments), strict=True)
    _checked(driver.cuLaunchKernelEx(config, kernel.handle, (values, types), 0))


@functools.cache
def _config(
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
    """Return what the sources include."""
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
    """Return what a call of the bindings gave beside its status."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA reported {status!r}.")
    return values[0] if values else None
