"""Builds csrc/cuda/*.cu for the CPU with the host's compiler (tests/cuda/emulation.h), once for every content."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch

from segadv.ops.common import check_labels
from segadv.ops.cuda import CudaKernels

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
HEADERS = sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *ROOT.glob("tests/cuda/*.h")])
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DSEGADV_EMULATED")


def build(sources: Sequence[Path], name: str, *flags: str, link: Sequence[str] = ()) -> Path:
    """Compiles and links; gives the path of the file `name`, in a folder that is named after all that goes into it."""
    compiler = os.environ.get("CXX", "c++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    flags = (*FLAGS, *flags, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda'}")
    content = hashlib.sha256(repr((version, flags, link)).encode())
    for path in (*sources, *HEADERS):
        content.update(path.read_bytes())
    folder = ROOT / "build" / "cuda-emulated" / content.hexdigest()[:16]
    if not (folder / name).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent))

        def compile_one(source: Path) -> Path:
            target = work / f"{source.name}.o"
            run(compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target))
            return target

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        run(compiler, *flags, *map(str, objects), *link, "-o", str(work / name))
        for path in objects:
            path.unlink()
        try:
            work.rename(folder)
        except OSError:  # another test run was faster
            shutil.rmtree(work)
    return folder / name


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


@cache
def load(*flags: str) -> ModuleType:
    """The extension _segadv_emulated: the functions of _segadv_native.cuda, and seed(number). With -DSEGADV_PTX its
    kernels are not here, and it tells of launches: on_launch(function)."""
    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-fvisibility=hidden")
    sources = (*KERNELS, ROOT / "csrc" / "binding.cpp")
    path = build(sources, "_segadv_emulated.so", *includes, *flags, link=("-shared",))
    spec = importlib.util.spec_from_file_location("_segadv_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class EmulatedKernels(CudaKernels):
    """The CUDA kernels, compiled for the CPU by this test run, their threads one after the other in random order.

    Whether they stay inside their workspace is looked at; on a GPU nobody sees it. As everywhere on the CPU, a bad
    label is an error.
    """

    check_labels = staticmethod(check_labels)

    def unavailable(self, device_type: str) -> str | None:
        return None if device_type == "cpu" else "it is made for CPU tensors"

    def _launch(self, kernel: Any, like: torch.Tensor, *arguments: Any, workspace_bytes: int = 0) -> None:
        workspace = torch.full((workspace_bytes + 65536,), 255, dtype=torch.uint8)  # NaN, and -1
        kernel(*arguments, workspace.data_ptr() if workspace_bytes else 0, 0)
        behind = int((workspace[workspace_bytes:] != 255).sum())
        assert behind == 0, f"{kernel.__name__} wrote {behind} bytes behind its workspace of {workspace_bytes}"

    def _pixels(
        self,
        kernel: Any,
        size: Any,
        labels: torch.Tensor,
        ignore_index: int,
        align_corners: bool,
        *arguments: Any,
    ) -> None:
        self.check_labels(labels, size[1], ignore_index)
        super()._pixels(kernel, size, labels, ignore_index, align_corners, *arguments)

    def confusion_matrix(
        self, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, align_corners: bool, per_image: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.check_labels(labels, logits.shape[1], ignore_index)
        return super().confusion_matrix(logits, labels, ignore_index, align_corners, per_image)
