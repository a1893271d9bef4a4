"""What the compiled kernels ask of memory, counted while ptx.py executes them: for each instruction of a warp the
sectors of 32 bytes that it touches, as a GPU moves whole ones.

    python tests/traffic.py triton        or: cuda

A line for each operation: bytes of all sectors over the fewest bytes that it has to move (each input read once, each
result written once), and bytes of an access of a warp, 512 at most. What a cache serves a second time counts again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))  # behind the installed packages

import compiled
import ptx

from segadv import functional as F
from segadv.ops import backends, library

counts: Counter[str] = Counter()


def watch(addresses: Any, size: int, threads: Any) -> None:
    first, last = addresses // 32, (addresses + np.uint64(size - 1)) // 32
    warps = threads // ptx.WARP
    touched = np.stack([np.repeat(warps, 2), np.stack([first, last], 1).ravel().astype(np.int64)], 1)
    counts["sectors"] += len(np.unique(touched, axis=0))
    counts["bytes"] += size * len(threads)
    counts["accesses"] += len(np.unique(warps))


def operations() -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, fewest bytes, and a call; logits are of the labels' size."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = torch.nn.functional.interpolate(torch.randn(1, 19, 17, 33), (128, 256), mode="bilinear").to(dtype)
        y = z.float().argmax(1).to(torch.uint8)
        y[:, :8] = 255
        read, pixels, name = z.nbytes + y.nbytes, y.numel(), str(dtype).removeprefix("torch.")
        # the map of runners-up, for the backward: a byte for each pixel
        yield f"averaged_gain {name}", read + pixels, lambda z=z, y=y: F.averaged_gain(z, y)
        leaf = z.detach().requires_grad_()
        total = F.averaged_gain(leaf, y).sum()
        backward = y.nbytes + pixels + z.nbytes
        yield f"its backward {name}", backward, lambda total=total, leaf=leaf: torch.autograd.grad(total, leaf)
        yield f"gain_and_grad {name}", read + z.nbytes, lambda z=z, y=y: F.gain_and_grad(z, y)
        yield f"loss_and_grad {name}", read + z.nbytes, lambda z=z, y=y: F.loss_and_grad(z, y)
        yield f"confusion_matrix {name}", read, lambda z=z, y=y: F.confusion_matrix(z, y)
    for dtype in (torch.float32, torch.bfloat16):
        z = torch.randn(1, 19, 32, 128).to(dtype).contiguous(memory_format=torch.channels_last)
        y = torch.randint(0, 19, (1, 32, 128), dtype=torch.uint8)
        both, name = 2 * z.nbytes + y.nbytes, f"{str(dtype).removeprefix('torch.')} channels_last"
        yield f"gain_and_grad {name}", both, lambda z=z, y=y: F.gain_and_grad(z, y)
        yield f"loss_and_grad {name}", both, lambda z=z, y=y: F.loss_and_grad(z, y)
        z, y = z[:, :16].contiguous(memory_format=torch.channels_last), y.clamp(max=15)
        both = 2 * z.nbytes + y.nbytes
        yield f"gain_and_grad of 16 {name}", both, lambda z=z, y=y: F.gain_and_grad(z, y)
    images, grad = torch.rand(2, 3, 128, 256), torch.randn(2, 3, 128, 256)
    gain, one = torch.ones(2), images.nbytes
    yield "l1_norm", one, lambda: F.l1_norm(grad)
    for dtype in (torch.float32, torch.bfloat16):
        small = grad.to(dtype)
        name = f"scale_gradient {str(dtype).removeprefix('torch.')}"
        yield name, 2 * small.nbytes, lambda small=small: library.scale_gradient(small, gain)
    yield "newton_step", 3 * one, lambda: F.newton_step(images, grad, gain)
    yield "sign_step", 4 * one, lambda: F.sign_step(images, grad, 0.1, origin=images.clone(), eps=0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory traffic of compiled kernels, against the fewest bytes.")
    parser.add_argument("kernels", choices=("triton", "cuda"))
    name = parser.parse_args().kernels
    if name == "cuda" and not compiled.nvcc():
        parser.error("kernels: cuda came, and needs an nvcc on the PATH, or CUDACXX=/path/to/nvcc")
    ptx.Machine.watch = staticmethod(watch)
    backends.BACKENDS[name] = compiled.CompiledTriton() if name == "triton" else compiled.CompiledCuda()
    with backends.backend(name):
        for what, fewest, call in operations():
            counts.clear()
            call()
            moved, access = 32 * counts["sectors"] / fewest, counts["bytes"] / counts["accesses"]
            print(f"{name} | {what} | {moved:.2f} of the fewest bytes | {access:.0f} bytes an access", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
