#!/usr/bin/env bash
# Run the kernels' tests with a native extension built with AddressSanitizer and UndefinedBehaviorSanitizer: an access
# beyond a tensor or beyond the shared memory of a block, a misaligned vector and an overflow end the run.
# Usage: launch/sanitize.sh [arguments of pytest]; by default all of tests/ops/kernels but those that start nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:=.venv/bin/python}" "${BUILD:=build/sanitize}"

cmake -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DSKBUILD_PROJECT_NAME=hecate \
  -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
  -DCMAKE_CXX_FLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" >/dev/null
cmake --build "$BUILD"

# Python leaks by design; torch reserves large ranges of addresses.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)" \
  "$PYTHON" - "$BUILD" "${@:---ignore=tests/ops/kernels/test_compile.py}" <<'RUN'
import glob, importlib.util, sys

(path,) = glob.glob(f"{sys.argv[1]}/_native*.so")
spec = importlib.util.spec_from_file_location("hecate._native", path)
sys.modules["hecate._native"] = native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)

import pytest

sys.exit(pytest.main(["-p", "no:cacheprovider", "-q", "tests/ops/kernels", *sys.argv[2:]]))
RUN
