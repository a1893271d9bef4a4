"""The kernels that Triton and nvcc compile for a GPU, on a machine without one: ptx.py executes what they made.

With SEGADV_TEST_COMPILED=all the tests' backends `triton` and, where there is an nvcc, `cuda-emulated` run this code,
and no other backend is tested ("few": random cases of one seed, in float32 and bfloat16 only):

    SEGADV_TEST_COMPILED=all pytest tests/test_step.py tests/test_margin.py tests/test_cross_entropy.py \
        tests/test_confusion.py

Compiled for compute capability 9.0. Compiling takes longer than the tests; Triton keeps what it has compiled in its
cache, nvcc's lies in build/ptx.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import emulated
import numpy as np
import ptx
import torch

from segadv.ops import cuda, kernels

ARCHITECTURE = 90


def bytes_of(tensors: Iterable[torch.Tensor]) -> dict[int, Any]:
    """address -> bytes of the memory of these tensors."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = np.frombuffer(
                (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), np.uint8
            )
    return found


# --- Triton ---------------------------------------------------------------------------------------------------------


class CompiledTriton:
    """The triton backend for CPU tensors."""

    def __init__(self) -> None:
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise RuntimeError("TRITON_INTERPRET=1 is set, with which Triton does not compile")
        import triton_compile  # imports Triton

        from segadv.ops import triton

        self._triton, self._compile = triton, triton_compile
        triton_compile.replace_launches(self._launch)
        self._compiled: dict[str, tuple[ptx.Kernel, int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._triton, name)

    def unavailable(self, device_type: str) -> str | None:
        return None if device_type == "cpu" else "it is made for CPU tensors"

    def _launch(self, kernel: Any, programs: Any, like: torch.Tensor, *arguments: Any, **options: Any) -> None:
        grid = programs if isinstance(programs, tuple) else (programs, 1)
        if 0 in grid:
            return
        compiled, settings = self._compile.source(kernel, arguments, options | {"enable_fp_fusion": True})
        key = f"{compiled.hash()} {sorted(settings.items())}"
        if key not in self._compiled:
            result = self._compile.compile_for(compiled, f"cuda:{ARCHITECTURE}", settings)
            (code,) = ptx.parse(result.asm["ptx"]).values()
            self._compiled[key] = code(), result.metadata.shared
        code, shared_bytes = self._compiled[key]
        values = [v for position, v in self._compile.values_of(kernel, arguments, options).items()
                  if (position,) not in compiled.constants]  # fmt: skip
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        numbers = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
        numbers += [0] * (len(code.parameters) - len(numbers))  # scratch memory, which these kernels do not use
        parameters = b""
        for (offset, size), number in zip(code.parameters.values(), numbers, strict=True):
            bits = number & ((1 << 8 * size) - 1)
            parameters = parameters.ljust(offset, b"\0") + bits.to_bytes(size, "little")
        ptx.Machine(code, grid, code.threads, parameters, bytes_of(tensors), shared_bytes).run()


# --- CUDA -----------------------------------------------------------------------------------------------------------


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def ptx_of_nvcc() -> list[str]:
    """The PTX of each of csrc/cuda/*.cu."""
    compiler = nvcc()
    assert compiler is not None
    # as CMakeLists.txt compiles them
    flags = ("-std=c++17", "-O3", f"-arch=compute_{ARCHITECTURE}", "-ptx", f"-I{emulated.ROOT / 'csrc'}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    content = hashlib.sha256(repr((version, flags)).encode())
    for path in (*emulated.KERNELS, *emulated.HEADERS):
        content.update(path.read_bytes())
    folder = emulated.ROOT / "build" / "ptx" / content.hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent))

        def compile_one(source: Path) -> None:
            emulated.run(compiler, *flags, str(source), "-o", str(work / f"{source.stem}.ptx"))

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(compile_one, emulated.KERNELS))
        try:
            work.rename(folder)
        except OSError:  # another test run was faster
            shutil.rmtree(work)
    return [path.read_text() for path in sorted(folder.glob("*.ptx"))]


def _name_on_the_host(name: str) -> str:
    """Of a kernel: nvcc gives the unnamed namespace of each file a name of its own, whose length comes before it."""
    found = re.fullmatch(r"(.*?)(\d+)(_GLOBAL__N__.*)", name)
    assert found is not None, name
    head, length, rest = found.groups()
    return f"{head}12_GLOBAL__N_1{rest[int(length) :]}"


def _remember_tensors(tensors: list[torch.Tensor]) -> None:
    """From now on every tensor that becomes an address is put into the list, until someone empties it."""

    def remembering(function: Any) -> Any:
        def remember(tensor: torch.Tensor | None) -> Any:
            if tensor is not None:
                tensors.append(tensor)
            return function(tensor)

        return remember

    kernels.view = cuda.view = remembering(kernels.view)
    kernels.row = remembering(kernels.row)


class CompiledCuda(emulated.EmulatedKernels):
    """The native backend of a GPU, for CPU tensors. Compiles when it is used."""

    def __init__(self) -> None:
        pass

    @property
    def core(self) -> Any:
        return load()

    def _launch(self, kernel: Any, like: torch.Tensor, *arguments: Any, workspace_bytes: int = 0) -> None:
        workspace = torch.full((workspace_bytes,), 255, dtype=torch.uint8)
        try:
            self.core.alive.append(workspace)
            kernel(*arguments, workspace.data_ptr(), 0)
        finally:
            self.core.alive.clear()


@cache
def load() -> ModuleType:
    """The functions of _segadv_native.cuda, their kernels executed as PTX; and `alive`, the tensors that they may
    touch."""
    core = emulated.load("-DSEGADV_PTX", "-O0")
    symbols = subprocess.run(["nm", core.__file__], capture_output=True, text=True, check=True).stdout
    names = {int(line.split()[0], 16): line.split()[2] for line in symbols.splitlines() if len(line.split()) == 3}
    code = {}
    for text in ptx_of_nvcc():
        code |= {_name_on_the_host(name): kernel for name, kernel in ptx.parse(text).items()}
    core.alive = []  # type: ignore[attr-defined]
    _remember_tensors(core.alive)

    def execute(address: int, blocks: int, threads: int, parameters: bytes) -> None:
        ptx.Machine(code[names[address]](), (blocks, 1), threads, parameters, bytes_of(core.alive)).run()

    core.on_launch(execute)
    return core
