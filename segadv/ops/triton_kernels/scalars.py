"""Numbers as arguments of kernels: as the bits of a float64, because Triton passes a Python float as float32."""

import struct

import triton
import triton.language as tl


def bits(value: float) -> int:
    (result,) = struct.unpack("<q", struct.pack("<d", value))
    return int(result)


@triton.jit
def scalar(float64_bits, A: tl.constexpr):
    return float64_bits.to(tl.int64).to(tl.float64, bitcast=True).to(A)
