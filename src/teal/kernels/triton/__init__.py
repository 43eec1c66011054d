"""Kernels in Triton, for the GPUs of every vendor that it compiles for."""
