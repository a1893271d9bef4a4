"""Block sizes, by kernel and GPU: a table, so that nothing is measured at a first call.

To extend it, run `python -m benchmarks.device --only tune` on the GPU in question: it times the candidates of every
kernel and prints the lines for `_TUNED`. A GPU without an entry takes `_DEFAULT`; no entry changes a result beyond
the order in which sums are taken.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton

# Read once, like Triton itself does when it decorates the kernels.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Config:
    """Elements of a program, and the warps that work on them."""

    block: int  # pixels of a program; quads for `gradient_up`
    # Float64 takes twice as many where logits are resampled. Not of `pixels` and `channels_last`, where it follows from
    # `block`: a thread takes 16 bytes of logits, or one pixel.
    num_warps: int = 1
    rows: int = 1  # `pixels_up`: most rows of pixels of a program. `gradient_up`: its rows of logits
    unroll: int = 1  # `pixels`, `pixels_up`: classes whose logits are loaded at once
    classes: int = 1  # `gradient_up`: classes of a program. `channels_last`: loaded together, at most 16


_DEFAULT = {
    "pixels": Config(block=1024, unroll=4),  # a walk over pixels of logits of the labels' size
    # The same where a pixel's classes are neighbours. With 16 of them fewer sectors are touched twice, but the
    # registers suffice for half as many threads.
    "channels_last": Config(block=256, classes=8),
    "pixels_up": Config(block=1024, num_warps=4, rows=8, unroll=2),  # where the logits are resampled
    "gradient_up": Config(block=32, num_warps=1, rows=8, classes=8),
    "step": Config(block=4096, num_warps=8),
}

# (major, minor) compute capability, or the architecture's name on other vendors' GPUs -> what differs from _DEFAULT.
_TUNED: dict[tuple[int, int] | str, dict[str, Config]] = {}

# Every program costs the interpreter about a millisecond and every operation in it 20 us, whatever its size.
_INTERPRETED = {
    "pixels": Config(block=4096),
    "channels_last": Config(block=4096, classes=16),
    "pixels_up": Config(block=4096, rows=64),
    "gradient_up": Config(block=16, rows=16, classes=256),
    "step": Config(block=1 << 16),
}


@cache
def _of_device(index: int) -> dict[str, Config]:
    if torch.version.hip is not None:
        return _DEFAULT | _TUNED.get(torch.cuda.get_device_properties(index).gcnArchName.split(":")[0], {})
    return _DEFAULT | _TUNED.get(torch.cuda.get_device_capability(index), {})


def config(kernel: str, device: torch.device) -> Config:
    if INTERPRETED:
        return _INTERPRETED[kernel]
    index = torch.cuda.current_device() if device.index is None else device.index
    return _of_device(index)[kernel]
