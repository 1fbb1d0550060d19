#!/usr/bin/env bash
# On a machine with a GPU and without network: install the checkout into an environment of its own, on top of the system's
# packages (torch, CuPy, nanobind, scikit-build-core), and run benchmarks/gpu_check.py from outside of the checkout.
# Usage: launch/gpu_check.sh [arguments of benchmarks/gpu_check.py]
set -euo pipefail
checkout="$(cd "$(dirname "$0")/.." && pwd)"
: "${PYTHON:=python3}" "${GPU_VENV:=$(mktemp -d)/venv}"

"$PYTHON" -m venv --system-site-packages "$GPU_VENV"
"$GPU_VENV/bin/python" -m pip install -q --no-build-isolation --no-deps --no-index "$checkout"
cd "$GPU_VENV"
exec "$GPU_VENV/bin/python" "$checkout/benchmarks/gpu_check.py" "$@"
