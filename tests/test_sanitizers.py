"""The kernels of the CPU and of CUDA, these compiled for the CPU, under AddressSanitizer and UBSan: sanitizers.cpp."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import emulated
import pytest


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_kernels_under_sanitizers(tmp_path: Path, where: str) -> None:
    """No element beside any tensor, no misaligned vector, no undefined behaviour, in any walk and floating type."""
    flags = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    kernels = emulated.KERNELS
    if where == "cpu":  # optimised, it would take minutes to build
        flags += ["-O0", "-fopenmp", "-Wno-psabi", "-DSANITIZE_CPU"]
        kernels = sorted((emulated.ROOT / "csrc" / "cpu").glob("*.cpp"))
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    try:
        emulated.run(os.environ.get("CXX", "c++"), *flags, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty"))
    except (RuntimeError, OSError) as error:
        pytest.skip(f"no compiler that has sanitizers, and OpenMP: {error}")
    program = emulated.build((*kernels, emulated.ROOT / "tests" / "sanitizers.cpp"), "sanitizers", *flags)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "done\n"
