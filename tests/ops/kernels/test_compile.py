"""The kernels compile for the device, with nvcc and with NVRTC, where these are installed; no GPU is needed."""

from __future__ import annotations

import shutil

import pytest

from hecate._native import kernel_names, run_kernel
from hecate.ops.kernels.compile import Resources, compile_kernels, main, parse
from hecate.ops.kernels.source import SOURCES, folder, read


def test_every_file_with_kernels_is_known() -> None:
    assert sorted(path.stem for path in folder().glob("*.cu")) == sorted(SOURCES)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_text_needs_no_other_file(source: str) -> None:
    text = read(source)
    assert "#include" not in text
    assert text.count("struct DeviceBlock") == 1  # each header once
    assert "#pragma once" not in text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not in PATH")
def test_nvcc_compiles_every_kernel_and_spills_no_register() -> None:
    found = compile_kernels([90])
    assert sorted(r.kernel for r in found) == kernel_names()  # each has its twin on the CPU
    assert {r.arch for r in found} == {90}
    assert not [r for r in found if r.spilled]
    assert all(r.registers <= 64 for r in found if r.kernel != "quota")  # four blocks of 256 threads fit


def test_nvrtc_compiles_every_kernel() -> None:
    """As CuPy does, whose options include -ftz=true."""
    nvrtc = pytest.importorskip("cupy.cuda.nvrtc", reason="CuPy is not installed", exc_type=ImportError)
    for source in SOURCES:
        program = nvrtc.createProgram(read(source), f"{source}.cu", (), ())
        nvrtc.compileProgram(program, ("-std=c++17", "-ftz=true", "-arch=sm_90"))
        assert nvrtc.getCUBIN(program)


def test_without_nvcc_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("PATH", "")
    assert main([]) == 2
    assert "nvcc is not in PATH" in capsys.readouterr().err


def test_the_report_of_ptxas_is_read() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'sort' for 'sm_100a'
ptxas info    : Function properties for sort
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
"""
    assert parse(log) == [Resources("sort", 100, 48, 44, 512)]


def test_arguments_of_another_size_are_refused() -> None:
    import numpy as np

    with pytest.raises(ValueError, match=r"count: 8 bytes of arguments, it takes 56"):
        run_kernel("count", np.zeros(1, dtype=np.int64), 1, 256, 1, 64, 0)
    with pytest.raises(ValueError, match="no kernel is called sink"):
        run_kernel("sink", np.zeros(1, dtype=np.int64), 1, 256, 1, 64, 0)
