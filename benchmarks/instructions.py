"""What the compiler made of the CUDA kernels: `python -m benchmarks.instructions [KERNEL ...] [--arch sm_90]`.

Registers, shared memory, stack, and how many instructions each loop holds, without those of the loops inside it. No
GPU is needed, only a core that was built with nvcc. The kernels' heads cite these figures where nothing has been
measured. All branches of a loop count, functions that it calls do not, and an unrolled loop holds several classes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from segadv import build_info


class Loop(NamedTuple):
    instructions: list[str]
    """Its own, without those of the loops inside it."""
    is_innermost: bool


def loops_of(sass: str) -> list[Loop]:
    """The loops of a kernel, in the order of the code."""
    code = [(int(at, 16), what) for at, what in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    ends: dict[int, int] = {}  # of the loops, by where they begin
    last_exit = -1  # what stands behind it and branches to before it is the rare path of an instruction there
    for at, what in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", what)
        if branch and last_exit < (begin := int(branch[1], 16)) < at:
            ends[begin] = at
        if what.strip() == "EXIT":
            last_exit = at
    loops = []
    for begin, end in sorted(ends.items()):
        inner = [(b, e) for b, e in ends.items() if begin < b and e <= end]
        own = [what for at, what in code if begin <= at <= end and not any(b <= at <= e for b, e in inner)]
        loops.append(Loop(own, not inner))
    return loops


def cuobjdump(*arguments: str | Path) -> str:
    program = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if program is None:  # Triton brings one
        import triton

        program = triton.knobs.nvidia.cuobjdump.path
    command = (program, *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def architectures_of(core: Path) -> list[str]:
    """Those whose machine code the core holds, in ascending order."""
    found = set(re.findall(r"\.(sm_(\d+)\w?)\.cubin", cuobjdump("-lelf", core)))
    return [name for name, _ in sorted(found, key=lambda pair: int(pair[1]))]


def kernels_of(core: Path, arch: str) -> dict[str, tuple[str, dict[str, str]]]:
    """The kernels by readable name: their name in the file, and what they need (REG, STACK, SHARED and others)."""
    found = re.findall(r"Function (\S+):\s+(REG:.*)", cuobjdump("-res-usage", "-arch", arch, core))
    names = subprocess.run(
        ["c++filt", *(name for name, _ in found)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    kernels = {}
    for readable, (name, needs) in zip(names, found, strict=True):
        short = re.sub(r"^void |\(anonymous namespace\)::|\w+::", "", readable)
        short = re.sub(r"\(\w+\)(?=\d)", "", short).split("(")[0]  # (Loss)0, and the parameters
        short = short.replace("> >", ">>")
        kernels[short] = name, dict(item.split(":", 1) for item in needs.split())
    return kernels


def code_of(core: Path, arch: str, names: Sequence[str]) -> dict[str, str]:
    """The machine code of kernels, by their names in the file."""
    listing = cuobjdump("-sass", "-arch", arch, "-fun", ",".join(names), core)
    return dict(re.findall(r"Function : (\S+)\n(.*?)\n\s+\.{10}", listing, re.DOTALL))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="part of the name; default: all")
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args(arguments)
    if not build_info()["cuda"]:
        parser.error("the installed core has no CUDA kernels: SEGADV_CUDA=ON pip install . says why")
    import _segadv_native

    core = Path(_segadv_native.__file__)
    known = architectures_of(core)
    if options.arch not in known:
        parser.error(f"--arch: {options.arch} came; the installed core was compiled for {', '.join(known)}")
    kernels = kernels_of(core, options.arch)
    chosen = [name for name in sorted(kernels) if any(part in name for part in options.kernels or [""])]
    if not chosen:
        parser.error(f"KERNEL: {' '.join(options.kernels)} came, and is part of no name: {', '.join(sorted(kernels))}")
    code = code_of(core, options.arch, [kernels[name][0] for name in chosen])
    print("| kernel | registers | shared, bytes | stack, bytes | instructions of its loops |")
    print("|---|---:|---:|---:|---|")
    for name in chosen:
        mangled, needs = kernels[name]
        loops = " ".join(str(len(loop.instructions)) for loop in loops_of(code[mangled]))
        print(f"| {name} | {needs['REG']} | {needs['SHARED']} | {needs['STACK']} | {loops} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
