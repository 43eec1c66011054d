#!/usr/bin/env bash
# Set up a virtual environment with the package and some of its extras.
#
#   tools/install.sh PYTHON VENV EXTRAS
#
# Torch comes first, in a step of its own: whatever is installed after it takes what is there.
# - With an NVIDIA GPU the user's own torch is used where PYTHON has one, else the newest is taken.
# - Without, the pinned CPU build is taken, which pulls no CUDA packages: from the package indexes
#   that pip is configured with, or from the one that the PyTorch project keeps for CPU builds.
# TEAL_TORCH names another requirement, such as "torch==2.11.0".
set -euo pipefail

python=$1 venv=$2 extras=$3
cpu_torch="torch==2.13.0+cpu"
cpu_index="https://download.pytorch.org/whl/cpu"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $python is older than Python 3.11. Name a newer one: make PYTHON=python3.12 …" >&2
  exit 2
}

has_gpu() { command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; }
has_torch() { "$1" -c 'import torch' > /dev/null 2>&1; }

if [ ! -x "$venv/bin/python" ]; then
  shared=""
  if has_gpu && has_torch "$python"; then shared="--system-site-packages"; fi
  "$python" -m venv $shared "$venv"
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! has_torch "$venv/bin/python"; then
  if [ -n "${TEAL_TORCH:-}" ]; then
    pip install "$TEAL_TORCH"
  elif has_gpu; then
    pip install torch
  else
    pip install "$cpu_torch" || pip install --index-url "$cpu_index" "$cpu_torch"
  fi
fi

pip install --constraint requirements/constraints.txt --editable ".[$extras]"

# CUDA builds of torch bring the Triton and the bindings that they were made for. Without one, any will
# do to run the GPU kernels' tests in the interpreter and to compile them ahead.
if [ "$extras" = dev ] && ! "$venv/bin/python" -c 'import triton' > /dev/null 2>&1; then
  pip install "triton==3.9.0"
fi
if [ "$extras" = dev ] && ! "$venv/bin/python" -c 'import cuda.bindings' > /dev/null 2>&1; then
  pip install "cuda-bindings==13.5.0" "nvidia-cuda-nvrtc==13.5.37"
fi
