"""Kernels in CUDA C++, compiled at run time by NVRTC."""
