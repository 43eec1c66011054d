"""Runs the CUDA kernels on the host, slowly; see emulated_cuda.h."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from teal.kernels.cuda import attention as cuda_attention
from teal.kernels.cuda import decode_step, embed_argmax
from teal.kernels.cuda import gemv as cuda_gemv
from teal.kernels.cuda.kernel_config import KernelConfig, cluster_of, header
from teal.kernels.cuda.nvrtc import Argument, Kernel

# Device of the tensors of tests that run on a GPU, or on an emulated one.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SOURCES = Path(decode_step.__file__).parent / "csrc"
HEADER = Path(__file__).parent / "emulated_cuda.h"
MODULES: tuple[ModuleType, ...] = (cuda_attention, embed_argmax, cuda_gemv, decode_step)

OPTIONS = ("-std=c++17", "-O1", "-fPIC", "-pthread", "-w")

# Dynamic shared memory comes from the launch.
DECLARED, GIVEN = (
    "extern __shared__ uint4 memory[];",
    "uint4* memory = reinterpret_cast<uint4*>(block->memory);",
)
ENTRY = """
using teal::u32;
extern "C" void run(u32 columns, u32 rows, int cluster, int threads, int bytes, void** arguments) {
  teal::launch(teal::%s, columns, rows, cluster, threads, bytes, arguments);
}
"""


def emulate(monkeypatch: pytest.MonkeyPatch, *, clusters: bool) -> None:
    """Let the launchers take CPU tensors, as on a GPU with or without clusters."""
    if torch.cuda.is_available():
        pytest.skip("the GPU runs such tests itself")
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    # Kernels are prepared for a device.
    cuda_gemv._prepared.cache_clear()
    for module in MODULES:
        monkeypatch.setattr(module, "launch", _launch)
        for name in ("function", "function_of_step"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, _function)
        if hasattr(module, "has_clusters"):
            monkeypatch.setattr(module, "has_clusters", lambda device: clusters)


@functools.cache
def _sources() -> tempfile.TemporaryDirectory[str]:
    """Write the sources to a folder, with functions of the host in place of ptx.cuh."""
    temporary = tempfile.TemporaryDirectory(prefix="emulated-")
    folder = Path(temporary.name)
    for path in (*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")):
        (folder / path.name).write_text(path.read_text().replace(DECLARED, GIVEN))
    shutil.copy(HEADER, folder / "ptx.cuh")
    # The host's headers take as long to compile as a kernel, so they are compiled once.
    included = [line for line in HEADER.read_text().splitlines() if line.startswith("#include <")]
    (folder / "host.h").write_text("\n".join(included) + "\n")
    command = ["g++", *OPTIONS, "-x", "c++-header", "host.h", "-o", "host.h.gch"]
    subprocess.run(command, check=True, cwd=folder)
    return temporary


@functools.cache
def _function(source: str, name: str, config: KernelConfig, device: object) -> Kernel:
    del device
    folder = Path(_sources().name)
    own = Path(tempfile.mkdtemp(dir=folder))
    (own / "config.cuh").write_text(header(config))
    entry, library = own / "entry.cpp", own / "entry.so"
    entry.write_text(f'#include "{source}"\n' + ENTRY % name)
    included = ["-include", "host.h", f"-I{own}", f"-I{folder}"]
    command = ["g++", *OPTIONS, "-shared", *included, str(entry), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    loaded = ctypes.CDLL(str(library))
    has_memory = "shared_bytes" in (folder / source).read_text()
    shared_bytes = ctypes.c_int.in_dll(loaded, "shared_bytes").value if has_memory else 0
    return Kernel((loaded.run, cluster_of(config)), shared_bytes)


def _launch(
    kernel: Kernel,
    grid: tuple[int, int],
    threads: int,
    arguments: Sequence[Argument],
    *,
    dependent: bool,
) -> None:
    del dependent
    run, cluster = kernel.handle
    values = [_value(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    run(*grid, cluster, threads, kernel.shared_bytes, pointers)


def _value(argument: Argument) -> Any:
    if isinstance(argument, tuple):
        value, kind = argument
        return kind(value)
    return ctypes.c_void_p(0 if argument is None else argument.data_ptr())
