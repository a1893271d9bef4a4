"""What the compiler made of the CUDA kernels: `python -m benchmarks.instructions [KERNEL ...] [--arch sm_90]`.

Registers, shared memory, and how many instructions each loop holds, without those of the loops inside it. No GPU is
needed, only a core that was built for the architecture. The kernels' heads cite these figures where nothing has been
measured. A loop's branches all count: what a run takes is fewer.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import triton

from segadv import build_info


def loops_of(sass: str) -> list[int]:
    """How many instructions each loop of a kernel holds, in the order of the code."""
    code = [(int(at, 16), what) for at, what in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    ends: dict[int, int] = {}  # of the loops, by where they begin
    for at, what in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", what)
        if branch and (begin := int(branch[1], 16)) < at:
            ends[begin] = at
    counts = []
    for begin, end in sorted(ends.items()):
        inner = [(b, e) for b, e in ends.items() if begin < b and e <= end]
        counts.append(sum(begin <= at <= end and not any(b <= at <= e for b, e in inner) for at, _ in code))
    return counts


def run(*command: str | Path) -> str:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stdout


def kernels_of(core: Path, arch: str, parts: Sequence[str] = ("",)) -> list[tuple[str, str, str]]:
    """Name, resources and machine code of the kernels in the core whose names have one of these parts."""
    tool = triton.knobs.nvidia.cuobjdump.path
    found = re.findall(r"Function (\S+):\s+(REG:.*)", run(tool, "-res-usage", "-arch", arch, core))
    readable = run("c++filt", *(name for name, _ in found)).splitlines()
    kernels = []
    for (name, resources), long in zip(found, readable, strict=True):
        short = re.sub(r"^void |\(anonymous namespace\)::|\w+::", "", long)
        short = re.sub(r"\(\w+\)(?=\d)", "", short).split("(")[0]
        if any(part in short for part in parts):
            kernels.append((name, short, resources))
    listing = run(tool, "-sass", "-arch", arch, "-fun", ",".join(name for name, _, _ in kernels), core)
    code = dict(re.findall(r"Function : (\S+)\n(.*?)\n\s+\.{10}", listing, re.DOTALL))
    return [(short, resources, code[name]) for name, short, resources in kernels]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="part of the name; default: all")
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args(arguments)
    import _segadv_native

    kernels = kernels_of(Path(_segadv_native.__file__), options.arch, options.kernels or [""])
    if not kernels:
        parser.error(
            f"no kernel of the installed core is named {' or '.join(options.kernels) or 'anything'} and compiled for "
            f"--arch {options.arch}; CUDA: {build_info()['cuda']}"
        )
    rows = [
        (name, resource["REG"], resource["SHARED"], resource["STACK"], " ".join(map(str, loops_of(code))))
        for name, resources, code in kernels
        for resource in [dict(item.split(":", 1) for item in resources.split())]
    ]
    print("| kernel | registers | shared, bytes | stack, bytes | instructions of its loops |")
    print("|---|---:|---:|---:|---|")
    for row in sorted(rows):
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
