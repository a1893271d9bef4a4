"""Compiles every Triton kernel for GPUs that this machine need not have, and prints what the assembler says.

The interpreter accepts much that the compiler does not. Run as a program: the tests' own process interprets.

    python tests/triton_compile.py cuda:90 hip:gfx942
    python tests/triton_compile.py cuda:90 hip:gfx942 --few      float32 only, at fewer sizes
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(str(Path(__file__).parents[1]))  # behind the installed packages

from benchmarks.instructions import cuobjdump, loops_of
from segadv.ops.common import compute_dtype
from segadv.ops.triton_kernels import (
    configs,
    confusion,
    cross_entropy,
    gradient,
    margin,
    step,
    tiles,
)
from segadv.ops.triton_kernels.operations import OPERATIONS

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def replace_launches(launch: Any) -> None:
    """From now on a launch is what is given; block sizes are those of a GPU."""
    for module in (tiles, margin, cross_entropy, gradient, confusion, step):
        module.launch = launch
        if hasattr(module, "config"):
            module.config = lambda kernel, device: configs._DEFAULT[kernel]


def record(calls: list[Call]) -> None:
    """From now on a launch is only written down."""

    def launch(kernel: Any, programs: Any, like: torch.Tensor, *arguments: Any, **options: Any) -> None:
        calls.append((kernel, arguments, options | {"enable_fp_fusion": True}))

    replace_launches(launch)


def operations(few: bool) -> Iterator[tuple[str, Any]]:
    """Every kernel in every variant that differs in code, at the sizes of real use."""
    layouts = [((256, 256), False), ((32, 32), False), ((256, 256), True), ((32, 32), True), ((96, 96), False)]
    for dtype in (torch.float32,) if few else (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for own, channels_last in layouts[:3] if few else layouts:
            z = torch.randn(2, 19, *own).to(dtype)
            if channels_last:
                z = z.contiguous(memory_format=torch.channels_last)
            y = torch.zeros(2, 256, 256, dtype=torch.uint8 if dtype is torch.float32 else torch.int64)
            wide = torch.zeros(2, 256, 256, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
            weight = torch.ones(2, 19, dtype=wide.dtype)
            one = wide[:, :1, :1].expand(y.shape)
            name = f"{str(dtype)[6:]} {own[0]} -> 256{' channels_last' if channels_last else ''}"
            yield f"pixel_margin {name}", lambda z=z, y=y: OPERATIONS.pixel_margin(z, y, 255, False)
            yield f"gain_and_grad {name}", lambda z=z, y=y: OPERATIONS.gain_and_grad(z, y, 255, True)
            yield (
                f"loss_and_grad {name}",
                lambda z=z, y=y: OPERATIONS.loss_and_grad(z, y, None, "cross_entropy", 0.0, False, 255, False),
            )
            yield f"confusion_matrix {name}", lambda z=z, y=y: OPERATIONS.confusion_matrix(z, y, 255, False, True)
            if own == (96, 96):
                continue
            yield (
                f"margin_backward {name}",
                lambda z=z, y=y, g=one, cl=channels_last: OPERATIONS.margin_backward(
                    g, y, y.to(torch.uint8), list(z.shape), cl, z.dtype, 255, False
                ),
            )
            yield (
                f"cross_entropy {name}",
                lambda z=z, y=y, w=weight: OPERATIONS.cross_entropy(
                    z, y, w, "cross_entropy", 0.0, False, 255, False, True, True
                ),
            )
            yield (
                f"segpgd_loss {name}",
                lambda z=z, y=y: OPERATIONS.cross_entropy(z, y, None, "segpgd", 0.25, False, 255, False, False, True),
            )
            yield (
                f"cospgd_loss {name}",
                lambda z=z, y=y: OPERATIONS.cross_entropy(z, y, None, "cospgd", 0.0, True, 255, False, False, True),
            )
            yield (
                f"cross_entropy_backward {name}",
                lambda z=z, y=y, m=wide, w=weight: OPERATIONS.cross_entropy_backward(m, z, y, m, m, w, m, 255, False),
            )
            yield f"argmax_labels {name}", lambda z=z: OPERATIONS.argmax_labels(z, [256, 256], False)
        # where the offsets of all pixels of a tile, or of its columns, are one
        degenerate = [((1, 1), (40, 40), True), ((4, 1), (1, 9), True), ((2, 1), (16, 1), False),
                      ((2, 2), (1, 1), False)]  # fmt: skip
        for own, size, align in degenerate[:2] if few else degenerate:
            z, y = torch.randn(1, 19, *own).to(dtype), torch.zeros(1, *size, dtype=torch.uint8)
            name = f"{str(dtype)[6:]} {own} -> {size}"
            yield f"gain_and_grad {name}", lambda z=z, y=y, a=align: OPERATIONS.gain_and_grad(z, y, 255, a)
            yield (
                f"loss_and_grad {name}",
                lambda z=z, y=y, a=align: OPERATIONS.loss_and_grad(z, y, None, "segpgd", 0.25, False, 255, a),
            )
            yield f"argmax_labels {name}", lambda z=z, size=size, a=align: OPERATIONS.argmax_labels(z, [*size], a)
        x = torch.rand(2, 3, 256, 256).to(dtype)
        yield f"l1_norm {str(dtype)[6:]}", lambda x=x: OPERATIONS.l1_norm(x)
        factor = torch.ones(2, dtype=compute_dtype(dtype))
        yield f"scale_gradient {str(dtype)[6:]}", lambda x=x, f=factor: OPERATIONS.scale_gradient(x, f)
        if dtype in (torch.float32, torch.float64):
            gain, name = torch.ones(2, dtype=dtype), str(dtype)[6:]
            yield f"newton_step {name}", lambda x=x, g=gain: OPERATIONS.newton_step(x, x, g, 0.0, 1.0, True, 0.5)
            yield f"sign_step {name}", lambda x=x: OPERATIONS.sign_step(x, x, 0.1, None, x, 0.1, None, 0.0, 1.0)
            yield f"sign_step per image {name}", lambda x=x, g=gain: OPERATIONS.sign_step(x, x, 0, g, x, 0, g, 0.0, 1.0)


def source(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile at this call, specialised as it does."""
    settings = {name: value for name, value in options.items() if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for position, value in values_of(kernel, arguments, options).items():
        parameter = kernel.params[position]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(position,)] = "constexpr", value
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), settings


def values_of(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[int, Any]:
    """What every parameter of the kernel is, by position."""
    by_name = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    return {position: by_name[parameter.name] for position, parameter in enumerate(kernel.params)}


def compile_for(compiled: ASTSource, name: str, settings: dict[str, Any]) -> Any:
    return triton.compile(compiled, target=target(name), options=settings)


TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
}


def target(name: str) -> GPUTarget:
    backend, architecture = name.split(":")
    if backend == "cuda":
        return GPUTarget("cuda", int(architecture), 32)
    return GPUTarget("hip", architecture, 64)


def resources(cubin: bytes) -> str:
    """Registers; bytes of the stack, to which registers that do not fit are spilled; barriers in innermost loops,
    which move values between layouts through shared memory; most loads of 16 bytes before the first store of a loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage", file.name)).groups()
        loops = loops_of(cuobjdump("-sass", file.name))
    barriers = sum("BAR.SYNC" in what for loop in loops if loop.is_innermost for what in loop.instructions)
    sizes = " ".join(str(len(loop.instructions)) for loop in loops)
    before = ["\n".join(loop.instructions).partition("STG") for loop in loops]
    ahead = max((loads.count("LDG.E.128") for loads, store, _ in before if store), default=0)
    return f"registers {registers} stack {stack} barriers {barriers} ahead {ahead} | loops {sizes}"


def conversions_in_loops(ttgir: str) -> int:
    """How often a loop moves values between layouts: through shared memory, behind a barrier."""
    opened, count = [], 0
    for line in ttgir.splitlines():
        count += "ttg.convert_layout" in line and True in opened
        if line.rstrip().endswith("{"):
            if "} else {" in line:
                opened.pop()
            opened.append("scf.for" in line or "scf.while" in line)
        elif line.lstrip().startswith("}"):
            opened.pop()
    return count


_jobs: list[tuple[str, str, str, ASTSource, dict[str, Any]]] = []  # what child processes find here


def _line(job: int) -> str:
    name, what, kernel, compiled, settings = _jobs[job]
    result = compile_for(compiled, name, settings)
    usage = resources(result.asm["cubin"]) if "cubin" in result.asm else f"{len(result.asm['hsaco'])} bytes"
    return f"{name} | {what} | {kernel} | {usage} | {conversions_in_loops(result.asm['ttgir'])} conversions"


def main() -> int:
    calls: list[Call] = []
    record(calls)
    targets = [argument for argument in sys.argv[1:] if argument != "--few"]
    seen: set[str] = set()
    for what, run in operations("--few" in sys.argv):
        calls.clear()
        run()
        for kernel, arguments, options in calls:
            compiled, settings = source(kernel, arguments, options)
            if compiled.hash() not in seen:
                seen.add(compiled.hash())
                _jobs.extend((name, what, kernel.__name__, compiled, settings) for name in targets)
    _jobs.sort(key=lambda job: targets.index(job[0]))
    fork = multiprocessing.get_context("fork")  # a source holds what cannot be pickled
    with ProcessPoolExecutor(mp_context=fork) as pool:
        for line in pool.map(_line, range(len(_jobs))):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
