#!/usr/bin/env bash
# Install torch into the environment of $PYTHON, unless it is there: with CUDA where there is a GPU, else the CPU build.
set -euo pipefail
: "${PYTHON:=python3}" "${TORCH:=torch==2.13.0}" "${TORCH_CPU:=https://download.pytorch.org/whl/cpu}"

if "$PYTHON" -c 'import torch' 2>/dev/null; then
  exit 0
fi
if [ -e /dev/nvidiactl ]; then
  exec "$PYTHON" -m pip install -q "$TORCH"
fi
# PyTorch's own index has the CPU build (0.2 GB; the one on PyPI brings 3 GB of CUDA). A machine behind a mirror of
# PyPI may not reach it, and gets what the mirror has.
if "$PYTHON" - "$TORCH_CPU" <<'REACH' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=10)
REACH
then
  exec "$PYTHON" -m pip install -q "$TORCH" --index-url "$TORCH_CPU" --extra-index-url https://pypi.org/simple
fi
echo "install_torch: $TORCH_CPU is out of reach; installing $TORCH from the default index"
exec "$PYTHON" -m pip install -q "$TORCH"
