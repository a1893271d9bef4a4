"""Executes PTX, the code that compilers make for NVIDIA GPUs, on the CPU: compiled kernels are tested without a GPU.

All threads of a grid go through the code together, with a NumPy array for every register; those that branch to a later
place wait until the others have come as far. No model of a GPU's scheduling, caches or speed: it shows what a kernel
computes, and raises `KernelError` for what a GPU would refuse, or for what would depend on the order of its threads:

* memory outside of the given tensors, and addresses that are not a multiple of an access's size;
* memory that one thread writes and another one reads or writes without a barrier between them (of two that write the
  same value at once nothing is said), shared memory that is read and was never written;
* barriers, shuffles, votes and reductions at which some of the threads they name do not arrive.

What it knows are the instructions that nvcc and Triton make of this package's kernels; any other is a
NotImplementedError. Semantics: NVIDIA, "PTX ISA". Approximate instructions (ex2, rcp.approx, div.full, sqrt.approx) err
as much as it allows, some of their results upwards and some downwards: what relies on more fails here.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import emulated
import numpy as np

WARP = 32
_WINDOW = 20  # log2 of the bytes between the shared memories of two blocks

_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}

Array = Any
Run = Callable[["Machine", Array], None]
Read = Callable[["Machine"], Array]


class KernelError(RuntimeError):
    """What a GPU would refuse, or what depends on the order of threads."""


@cache
def dtype_of(kind: str) -> Any:
    """The NumPy type of a PTX type such as u32; of bf16 and of untyped bits the unsigned one."""
    if kind in _FLOATS:
        return np.dtype(_FLOATS[kind])
    if kind == "pred":
        return np.dtype(np.bool_)
    bits = int(kind.removeprefix("bf").lstrip("bsu"))
    return np.dtype((_SIGNED if kind[0] == "s" else _UNSIGNED)[bits])


# --- the text -------------------------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """A kernel, decoded.

    Attributes:
        parameters: name -> (offset in the bytes that a launch gives, number of bytes).
        threads: of a block, as the text says; 0 where it does not.
        shared: name of a variable -> its address in a block's shared memory.
        shared_bytes: of these variables.
        blocks: the instructions between labels, branches and barriers: (guard, opcode and operands, what it does).
        labels: name -> index in `blocks`.
    """

    name: str
    parameters: dict[str, tuple[int, int]]
    threads: int
    shared: dict[str, int]
    shared_bytes: int
    registers: dict[str, str]
    blocks: list[list[tuple[str | None, str, list[str], Run | None]]]
    labels: dict[str, int]

    def width(self, register: str) -> int:
        """Bits of a register, 0 of a predicate."""
        kind = self.registers.get(register) or self.registers[register.rstrip("0123456789")]
        return 0 if kind == "pred" else 8 * int(dtype_of(kind).itemsize)


_BRACE = re.compile(r"[{}]")


def parse(text: str) -> dict[str, Callable[[], Kernel]]:
    """The kernels of a PTX file, by name; each is decoded when it is asked for the first time."""
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))
    kernels: dict[str, Callable[[], Kernel]] = {}
    outside, end = "", 0
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", text, flags=re.DOTALL):
        outside += text[end : match.start()]
        depth, end = 1, match.end()
        braces = _BRACE.finditer(text, end)
        while depth:
            brace = next(braces)
            depth, end = depth + (1 if brace[0] == "{" else -1), brace.end()
        name, parameters, directives = match.groups()
        kernels[name] = cache(partial(_kernel, name, parameters, directives, text[match.end() : end - 1], outside))
    return kernels


def _kernel(name: str, parameters: str, directives: str, body: str, outside: str) -> Kernel:
    declared, top = {}, 0
    for parameter in filter(str.strip, parameters.split(",")):
        # .param .align 8 .b8 name[208], .param .u32 name, .param .u64 .ptr .global .align 1 name
        kind, own = re.findall(r"\.([subf]\d+)\b.*?([\w$]+(?:\[\d+\])?)\s*$", parameter)[0]
        own, _, count = own.rstrip("]").partition("[")
        aligned = re.search(r"\.param\s+\.align\s+(\d+)", parameter)
        align = int(aligned[1]) if aligned else dtype_of(kind).itemsize
        size = dtype_of(kind).itemsize * int(count or 1)
        declared[own] = (_round_up(top, align), size)
        top = declared[own][0] + size
    shared, bytes_of_shared = {}, 0
    variables = re.findall(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d*)\]", outside + body)
    for align, variable, size in sorted(variables, key=lambda entry: entry[2] == ""):  # what has no size comes last
        if variable in outside and variable not in body:
            continue
        shared[variable] = _round_up(bytes_of_shared, int(align or 1))
        bytes_of_shared = shared[variable] + int(size or 0)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
    registers = {prefix: kind for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%?\w+?)(?:<\d+>)?\s*;", body)}
    kernel = Kernel(name, declared, int(threads[1]) if threads else 0, shared, bytes_of_shared, registers, [[]], {})
    for statement in _statements(body):
        if statement.endswith(":"):
            if kernel.blocks[-1]:
                kernel.blocks.append([])
            kernel.labels[statement[:-1]] = len(kernel.blocks) - 1
            continue
        found = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, flags=re.DOTALL)
        if found is None:
            raise NotImplementedError(f"{name}: {statement!r}")
        guard, opcode, rest = found.groups()
        operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        control = opcode.split(".")[0] in ("bra", "ret", "exit", "bar", "barrier") and opcode != "bar.warp.sync"
        kernel.blocks[-1].append((guard, opcode, operands, None if control else decode(kernel, opcode, operands)))
        if control:
            kernel.blocks.append([])
    return kernel


def _statements(body: str) -> list[str]:
    """Instructions, and labels with their colon."""
    found = []
    for piece in re.split(r"[;\n]", body):
        line = piece.strip()
        while line and line[0] in "{}":  # scopes
            line = line[1:].strip()
        label = re.match(r"([\w$]+:)\s*(.*)", line)
        if label:
            found.append(label[1])
            line = label[2]
        if line and not line.startswith("."):
            found.append(line)
    return found


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


# --- memory ---------------------------------------------------------------------------------------------------------


class Clock:
    """Counts barriers: those of each block, and of each warp."""

    def __init__(self, blocks: int, threads: int) -> None:
        self.threads = threads
        self.of_block = np.zeros(blocks, np.int64)
        self.of_warp = np.zeros(blocks * threads // WARP, np.int64)

    def now(self, thread: Array) -> Array:
        return self.of_block[thread // self.threads] << 32 | self.of_warp[thread // WARP]

    def is_between(self, first: Array, last: Array, at: Array, thread: Array) -> Array:
        """Whether a barrier lies between now and what threads from `first` to `last` did at a time, or before."""
        block, warp = thread // self.threads, thread // WARP
        same_block = (first // self.threads == block) & (last // self.threads == block)
        same_warp = (first // WARP == warp) & (last // WARP == warp)
        return (same_block & (at >> 32 < self.of_block[block])) | (same_warp & (at < self.now(thread)))


class Region:
    """Bytes that lie together, and who touched each of them last."""

    def __init__(self, values: Array) -> None:
        self.values = values
        self.writer: Array | None = None  # arrays from the first writing on: most regions are never written
        self.reads: list[tuple[Array, Array, Array]] = []  # bytes, threads and times, until then

    def elements(self, dtype: Any) -> Array:
        size = np.dtype(dtype).itemsize
        return self.values[: len(self.values) // size * size].view(dtype)

    def note_read(self, at: Array, thread: Array, clock: Clock, what: str) -> None:
        now = clock.now(thread)
        if self.writer is None:
            self.reads.append((at, thread, now))
            return
        writer = self.writer[at]
        bad = (writer >= 0) & (writer != thread) & ~clock.is_between(writer, writer, self.written[at], thread)
        if bad.any():
            raise KernelError(
                f"{what}: thread {thread[bad][0]} reads what thread {writer[bad][0]} wrote, without a barrier between"
            )
        self._add_readers(at, thread, now, clock)

    def _add_readers(self, at: Array, thread: Array, now: Array, clock: Clock) -> None:
        gone = (self.last[at] < 0) | clock.is_between(self.first[at], self.last[at], self.read[at], thread)
        self.first[at[gone]] = self.last[at[gone]] = thread[gone]
        np.minimum.at(self.first, at, thread)
        np.maximum.at(self.last, at, thread)
        self.read[at] = now

    def note_write(self, at: Array, thread: Array, clock: Clock, what: str) -> None:
        if self.writer is None:
            self.writer, self.first, self.last = (np.full(len(self.values), -1) for _ in range(3))
            self.written, self.read = (np.zeros(len(self.values), np.int64) for _ in range(2))
            for earlier in self.reads:
                self._add_readers(*earlier, clock)
            self.reads = []
        for first, last, time, did in ((self.writer, self.writer, self.written, "wrote"),
                                       (self.first, self.last, self.read, "read")):  # fmt: skip
            low, high = first[at], last[at]
            bad = (high >= 0) & ((low != thread) | (high != thread)) & ~clock.is_between(low, high, time[at], thread)
            if bad.any():
                other = np.where(low != thread, low, high)[bad][0]
                raise KernelError(
                    f"{what}: thread {thread[bad][0]} writes where thread {other} {did}, without a barrier between"
                )
        self.writer[at] = thread
        self.written[at] = clock.now(thread)


class Memory:
    """Regions by their addresses."""

    def __init__(self, regions: Mapping[int, Array]) -> None:
        starts = sorted(regions)
        self.starts = np.array(starts, np.uint64)
        self.regions = [Region(regions[start]) for start in starts]
        self.ends = self.starts + np.array([len(regions[start]) for start in starts], np.uint64)

    def find(self, addresses: Array, size: int, what: str) -> list[tuple[Region, Any, Array]]:
        """(region, which of the addresses lie in it, their offsets) for each."""
        odd = addresses % np.uint64(size) != 0
        if odd.any():
            raise KernelError(f"{what}: the address {int(addresses[odd][0]):#x} is not a multiple of {size}")
        index = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = index < 0 if len(self.starts) else np.ones(len(addresses), np.bool_)
        if len(self.starts):
            outside |= addresses + np.uint64(size) > self.ends[np.maximum(index, 0)]
        if outside.any():
            bad = int(addresses[outside][0])
            near = min(((bad - int(start), len(r.values)) for start, r in zip(self.starts, self.regions, strict=True)),
                       key=lambda entry: abs(entry[0]), default=("?", "no memory"))  # fmt: skip
            raise KernelError(
                f"{what}: {int(outside.sum())} threads are outside of the memory, one at byte {near[0]} of {near[1]}"
            )
        first = int(index[0])
        if (index == first).all():
            return [(self.regions[first], slice(None), (addresses - self.starts[first]).astype(np.int64))]
        found: list[tuple[Region, Any, Array]] = []
        for number in np.unique(index).tolist():
            inside = np.flatnonzero(index == number)
            found.append((self.regions[number], inside, (addresses[inside] - self.starts[number]).astype(np.int64)))
        return found

    def load(self, addresses: Array, size: int, count: int, thread: Array, clock: Clock, what: str) -> list[Array]:
        """`count` numbers of `size` bytes from each address."""
        values = [np.empty(len(addresses), _UNSIGNED[8 * size]) for _ in range(count)]
        for region, inside, offsets in self.find(addresses, size * count, what):
            numbers = region.elements(_UNSIGNED[8 * size])
            for i, value in enumerate(values):
                value[inside] = numbers[offsets // size + i]
            region.note_read(*_each_byte(offsets, size * count, thread[inside]), clock, what)
        return values

    def store(self, addresses: Array, size: int, values: list[Array], thread: Array, clock: Clock, what: str) -> None:
        for region, inside, offsets in self.find(addresses, size * len(values), what):
            region.note_write(*_each_byte(offsets, size * len(values), thread[inside]), clock, what)
            numbers = region.elements(_UNSIGNED[8 * size])
            for i, value in enumerate(values):
                at = offsets // size + i
                numbers[at] = value[inside]
                if (numbers[at] != value[inside]).any():
                    raise KernelError(f"{what}: threads write different values to one place")


def _each_byte(offsets: Array, size: int, thread: Array) -> tuple[Array, Array]:
    return (offsets[:, None] + np.arange(size)).ravel(), np.repeat(thread, size)


# --- a launch -------------------------------------------------------------------------------------------------------


class Machine:
    """One launch of a kernel; `run` does it.

    Args:
        grid: blocks along x and y.
        threads: of a block, a multiple of 32.
        parameters: the bytes of the kernel's parameters, where `Kernel.parameters` says.
        memory: address -> bytes, a writable uint8 array: all that the kernel may touch.
        shared_bytes: of shared memory that the launch adds to what the text declares.
    """

    watch: Callable[[Array, int, Array], None] | None = None
    """Is told of every access to global memory: addresses, bytes of each, threads."""

    def __init__(self, kernel: Kernel, grid: tuple[int, int], threads: int, parameters: bytes,
                 memory: Mapping[int, Array], shared_bytes: int = 0) -> None:  # fmt: skip
        wanted = max((offset + size for offset, size in kernel.parameters.values()), default=0)
        if len(parameters) != wanted:
            raise ValueError(f"{kernel.name} takes {wanted} bytes of parameters, {len(parameters)} came")
        blocks = grid[0] * grid[1]
        self.kernel, self.n = kernel, blocks * threads
        self.thread = np.arange(self.n)
        self.block, self.lane, self.warp = self.thread // threads, self.thread % WARP, self.thread // WARP
        self.clock = Clock(blocks, threads)
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.memory = Memory(memory)
        self.shared_bytes = _round_up(kernel.shared_bytes + shared_bytes, 16)
        windows = range(blocks if self.shared_bytes else 0)
        self.shared = Memory({block << _WINDOW: np.zeros(self.shared_bytes, np.uint8) for block in windows})
        self.is_written = np.zeros((blocks, self.shared_bytes), np.bool_)  # each byte of shared memory
        special = {
            "tid.x": self.thread % threads, "ctaid.x": self.block % grid[0], "ctaid.y": self.block // grid[0],
            "ntid.x": threads, "nctaid.x": grid[0], "nctaid.y": grid[1], "laneid": self.lane,
        }  # fmt: skip
        self.registers: dict[str, Array] = {
            f"%{name}": np.broadcast_to(value, self.n).astype(np.uint32) for name, value in special.items()
        }

    def run(self) -> None:
        with np.errstate(all="ignore"):
            self._run()

    def _run(self) -> None:
        """The threads at the earliest place go first, so that those who went elsewhere meet again."""
        blocks = self.kernel.blocks
        end = len(blocks)
        place = np.zeros(self.n, np.int64)
        waiting = np.zeros(self.n, np.bool_)
        while True:
            running = (place < end) & ~waiting
            if not running.any():
                if not waiting.any():
                    return
                self._barrier(waiting)
                continue
            here = int(place[running].min())
            active = running & (place == here)
            everyone = None if active.all() else active
            place[active] = here + 1
            for guard, opcode, operands, run in blocks[here]:
                mask = everyone
                if guard is not None:
                    holds = self.registers[guard.lstrip("!")] ^ (guard[0] == "!")
                    mask = holds if mask is None else holds & mask
                if run is not None:
                    try:
                        run(self, mask)
                    except Exception as error:  # goes on, and says at which instruction it happened
                        error.add_note(f"at {opcode} {', '.join(operands)} in {self.kernel.name}")
                        raise
                    continue
                taken = active if mask is None else mask
                if opcode.startswith("bar"):
                    if operands != ["0"]:
                        raise NotImplementedError(f"{opcode} {operands}")
                    waiting |= taken
                else:
                    place[taken] = self.kernel.labels[operands[0]] if opcode.startswith("bra") else end

    def _barrier(self, waiting: Array) -> None:
        """All threads that could run have arrived at a barrier, or ended."""
        of_block = waiting.reshape(len(self.clock.of_block), -1)
        arrived = of_block.any(1)
        if (arrived != of_block.all(1)).any():
            block = int(np.flatnonzero(arrived != of_block.all(1))[0])
            raise KernelError(
                f"{self.kernel.name}: threads of block {block} have ended, others wait for them at a barrier"
            )
        self.clock.of_block += arrived
        waiting[:] = False

    def write(self, register: str, value: Array, mask: Array) -> None:
        """Numbers of the register's width, or predicates."""
        if value.shape != (self.n,):
            value = np.broadcast_to(value, (self.n,))
        if mask is not None:
            old = self.registers.get(register)
            value = np.where(mask, value, value.dtype.type(0) if old is None else old)
        self.registers[register] = value

    def meet(self, members: Array, mask: Array) -> None:
        """The lanes that an instruction for a warp names must be those that arrive at it."""
        active = np.ones(self.n, np.bool_) if mask is None else mask
        named = np.broadcast_to(members, (self.n,)) >> self.lane.astype(np.uint32) & np.uint32(1)
        arrived = np.repeat(active.reshape(-1, WARP).any(1), WARP)
        if (active != (arrived & (named != 0)))[arrived].any():
            raise KernelError("an instruction for a warp names lanes that are elsewhere, or not all that are here")


# --- instructions ---------------------------------------------------------------------------------------------------


def reader(kernel: Kernel, operand: str, kind: str) -> Read:
    """What gives an operand as numbers of that type, [threads] or []."""
    dtype = dtype_of(kind)
    if not operand.startswith("%") and operand not in kernel.registers:
        constant = _constant(kernel, operand, dtype)
        return lambda machine: constant
    if dtype == np.bool_:
        return lambda machine: machine.registers[operand]
    narrow = _UNSIGNED[8 * dtype.itemsize]
    if re.fullmatch(r"%(n?tid|n?ctaid|laneid)(\.[xyz])?", operand) or kernel.width(operand) == 8 * dtype.itemsize:
        return lambda machine: machine.registers[operand].view(dtype)
    return lambda machine: machine.registers[operand].astype(narrow).view(dtype)


def _constant(kernel: Kernel, text: str, dtype: Any) -> Array:
    bits = _UNSIGNED[8 * dtype.itemsize]
    if text in kernel.shared or text in kernel.parameters:  # an address
        return np.array(kernel.shared.get(text, kernel.parameters.get(text, (0,))[0]), bits).view(dtype)[()]
    if dtype == np.bool_:
        return np.bool_(int(text, 0))
    if re.match(r"0[fFdD]", text):
        return np.array(int(text[2:], 16), np.uint32 if text[1] in "fF" else np.uint64).view(dtype)[()]
    return np.array(int(text.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1), bits).view(dtype)[()]


def writer(kernel: Kernel, register: str) -> Callable[[Machine, Array, Array], None]:
    """What puts numbers of any type into a register: narrower ones are extended by zeros, or their sign."""
    if register == "_":
        return lambda machine, value, mask: None
    bits = kernel.width(register)
    if bits == 0:
        return lambda machine, value, mask: machine.write(register, value, mask)

    def put(machine: Machine, value: Array, mask: Array) -> None:
        if value.dtype.itemsize * 8 != bits:
            value = value.astype((_SIGNED if value.dtype.kind == "i" else _UNSIGNED)[bits])
        machine.write(register, value.view(_UNSIGNED[bits]), mask)

    return put


def decode(kernel: Kernel, opcode: str, operands: Sequence[str]) -> Run:
    """What an instruction does, to the threads of a mask (None: to all)."""
    parts = opcode.replace("::", "_").split(".")
    name, kind = parts[0], parts[-1]
    # The rounding, saturation or half of a product that is not known would otherwise be passed over.
    known = _MODIFIERS.get(name, {"rn", "lo", "wide", "ftz", "full", "approx"})
    if known is not None and not set(parts[1 : -2 if name == "cvt" else -1]) <= known:
        raise NotImplementedError(f"{kernel.name}: {opcode} {', '.join(operands)}")
    if name in ("ld", "st", "atom", "red"):
        return _memory(kernel, parts, operands)
    if name in ("ldmatrix", "stmatrix"):
        return _matrix(kernel, parts, operands)
    if name in ("shfl", "redux", "vote") or opcode == "bar.warp.sync":
        return _of_a_warp(kernel, parts, operands)
    if name == "mov" and "{" in operands[0] + operands[1]:
        return _pack(kernel, kind, operands)
    if name == "cvt" and parts[-2] in ("bf16x2", "f16x2"):
        upper, lower = (_convert(kernel, parts[-2][:-2], kind, parts, operand) for operand in operands[1:])
        return _apply(kernel, operands[0], lambda u, v: _joined(u, v), upper, lower)
    if name == "cvt":
        return _apply(kernel, operands[0], lambda a: a, _convert(kernel, parts[-2], kind, parts, operands[1]))
    if name == "setp" and kind in ("bf16", "bf16x2", "f16x2"):
        return _compare_halves(kernel, _comparison(parts[1]), kind, operands)
    if name == "setp":
        operation: Callable[..., Array] = _comparison(parts[1])
        kinds = [kind] * 2
    elif name == "selp":
        operation, kinds = lambda a, b, chosen: np.where(chosen, a, b), [kind, kind, "pred"]
    elif name in ("shl", "shr"):
        operation, kinds = _shift_left if name == "shl" else _shift_right, [kind, "u32"]
    elif name == "bfe":
        operation, kinds = _extract, [kind, "u32", "u32"]
    elif name == "mad" and parts[1] == "wide":
        operation, kinds = lambda a, b, c: _wide(a) * _wide(b) + c, [kind, kind, kind[0] + str(2 * int(kind[1:]))]
    elif name == "mul" and parts[1] == "wide":
        operation, kinds = lambda a, b: _wide(a) * _wide(b), [kind] * 2
    elif name == "abs" and kind.endswith(("bf16", "x2")):
        ones = np.uint16(0x7FFF) if kind == "bf16" else np.uint32(0x7FFF7FFF)
        operation, kinds = lambda a: a & ones, ["b16" if kind == "bf16" else "b32"]
    elif kind in ("s16x2", "u16x2") and name in ("add", "sub", "min", "max"):
        of_halves = _OPERATIONS[name]
        operation, kinds = lambda a, b: of_halves(*_halves(kind, a, b)).view(np.uint32), ["b32"] * 2
    elif name == "createpolicy":
        return _apply(kernel, operands[0], lambda: np.uint64(0))
    elif name == "rcp" and parts[1] == "approx" and kind == "f64":
        operation, kinds = _approximate_reciprocal, [kind]
    elif name in _OPERATIONS:
        operation, kinds = _OPERATIONS[name], [kind] * (len(operands) - 1)
        exact = operation
        if not {"approx", "full"}.isdisjoint(parts):
            operation = lambda *a: _off(exact(*a), _ULPS[name], *a)  # noqa: E731
        if "ftz" in parts:
            inner = operation
            operation = lambda *a: _flush(inner(*map(_flush, a)))  # noqa: E731
    else:
        raise NotImplementedError(f"{kernel.name}: {opcode} {', '.join(operands)}")
    readers = [reader(kernel, operand, own) for operand, own in zip(operands[1:], kinds, strict=True)]
    return _apply(kernel, operands[0], operation, *readers)


# Of the others None: they are looked at where they are decoded, or (caches, scopes) change no result.
_MODIFIERS: dict[str, set[str] | None] = {
    **dict.fromkeys(("ld", "st", "atom", "red", "ldmatrix", "stmatrix", "shfl", "redux", "vote", "bar")),
    "createpolicy": None,
    "cvt": {"rn"},
    "cvta": {"to", "global"},
    "setp": {"num", "nan", *(name + u for name in ("eq", "ne", "lt", "le", "gt", "ge") for u in ("", "u"))},
}


def _apply(kernel: Kernel, target: str, operation: Callable[..., Array], *readers: Read) -> Run:
    put = writer(kernel, target)
    return lambda machine, mask: put(machine, operation(*[read(machine) for read in readers]), mask)


def _halves(kind: str, *given: Array) -> list[Array]:
    """Numbers of 32 bits as twice as many of 16."""
    return [np.ascontiguousarray(value).view(dtype_of(kind[:-2])) for value in np.broadcast_arrays(*given)]


def _comparison(name: str) -> Callable[[Array, Array], Array]:
    if name == "num":
        return lambda a, b: (a == a) & (b == b)
    if name == "nan":
        return lambda a, b: (a != a) | (b != b)
    if name[-1] == "u":  # or unordered
        opposite = _COMPARE[{"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}[name[:-1]]]
        if name == "equ":
            return lambda a, b: ~((a < b) | (a > b))
        if name == "neu":
            return np.not_equal
        return lambda a, b: ~opposite(a, b)
    if name == "ne":
        return lambda a, b: (a != b) & (a == a) & (b == b)
    return _COMPARE[name]


def _compare_halves(kernel: Kernel, compare: Callable[..., Array], kind: str, operands: Sequence[str]) -> Run:
    """setp of numbers of 16 bits; of two at once, the first predicate is of the lower ones."""
    targets = operands[0].split("|")
    readers = [reader(kernel, operand, f"b{16 * len(targets)}") for operand in operands[1:]]

    def number(a: Array, shift: int) -> Array:
        half = (a >> a.dtype.type(shift)).astype(np.uint16)
        return half.view(np.float16) if kind == "f16x2" else (half.astype(np.uint32) << np.uint32(16)).view(np.float32)

    runs = [_apply(kernel, target, lambda a, b, s=16 * i: compare(number(a, s), number(b, s)), *readers)
            for i, target in enumerate(targets)]  # fmt: skip

    def run(machine: Machine, mask: Array) -> None:
        for one in runs:
            one(machine, mask)

    return run


_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


@cache
def _fma_functions() -> tuple[Any, Any]:
    source = emulated.ROOT / "tests" / "cuda" / "fma.cpp"
    library = ctypes.CDLL(str(emulated.build([source], "fma.so", link=("-shared",))))
    return library.fma32, library.fma64


def _fma(a: Array, b: Array, c: Array) -> Array:
    """Rounded once, which NumPy cannot."""
    given = [np.ascontiguousarray(value) for value in np.broadcast_arrays(a, b, c)]
    result = np.empty_like(given[0])
    function = _fma_functions()[result.dtype == np.float64]
    function(*(ctypes.c_void_p(array.ctypes.data) for array in (*given, result)), ctypes.c_long(result.size))
    return result


def _divide(a: Array, b: Array) -> Array:
    """As in C, whatever where b is 0."""
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(quotient.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return a - _divide(a, b) * b


def _shift_left(a: Array, amount: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(amount >= bits, a.dtype.type(0), a << np.minimum(amount, np.uint32(bits - 1)).astype(a.dtype))


def _shift_right(a: Array, amount: Array) -> Array:
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(amount, np.uint32(bits - 1)).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(amount >= bits, a.dtype.type(0), shifted)


def _extract(a: Array, start: Array, length: Array) -> Array:
    """Bits of a number, by constants."""
    bits = a.dtype.itemsize * 8
    return (a << a.dtype.type(bits - start - length)) >> a.dtype.type(bits - length)


def _wide(a: Array) -> Array:
    return a.astype((_SIGNED if a.dtype.kind == "i" else _UNSIGNED)[16 * a.dtype.itemsize])


def _flush(a: Array) -> Array:
    """Subnormal numbers become 0."""
    return np.where(np.abs(a) < np.finfo(a.dtype).tiny, np.copysign(a.dtype.type(0), a), a)


_ULPS = {"ex2": 2, "rcp": 1, "div": 2, "sqrt": 1}  # that approximate instructions may be off


def _off(result: Array, ulps: int, *given: Array) -> Array:
    """A few units in the last place off, upwards or downwards as the bits of what is given say; but for infinity, NaN,
    0, and 2^0, which is promised to be 1."""
    mixed = np.uint32(0)
    for value in given:
        mixed = (mixed ^ np.ascontiguousarray(value).view(np.uint32)) * np.uint32(0x9E3779B1)
    steps = np.where(mixed >> np.uint32(31), np.int32(ulps), np.int32(-ulps))
    moved = (result.view(np.int32) + steps).view(np.float32)
    fixed = ~np.isfinite(result) | (np.abs(result) < np.finfo(np.float32).tiny) | (~np.isfinite(moved))
    if len(given) == 1:
        fixed = fixed | (given[0] == 0)
    return np.where(fixed, result, moved)


def _approximate_reciprocal(a: Array) -> Array:
    """Its lower 32 bits are 0."""
    result = _flush(1 / _flush(a))
    return (result.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Any four of eight bytes, or their signs."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for i in range(4):
        chosen = selector >> np.uint32(4 * i)
        byte = both >> ((chosen & np.uint32(7)) << np.uint32(3)).astype(np.uint64) & np.uint64(255)
        byte = np.where(chosen & np.uint32(8), np.where(byte > 127, np.uint64(255), np.uint64(0)), byte)
        result = result | byte.astype(np.uint32) << np.uint32(8 * i)
    return result


_OPERATIONS: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "fma": _fma,
    "div": _divide,
    "rem": _remainder,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": np.abs,
    "min": lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
    "max": lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
    "prmt": _permute,
    "ex2": lambda a: np.exp2(a, dtype=np.float64).astype(a.dtype),  # rounded once, which NumPy's in float32 is not
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "mov": lambda a: a,
    "cvta": lambda a: a,
}


def _bf16_of(a: Array) -> Array:
    bits = a.view(np.uint32).astype(np.uint64)
    rounded = bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)
    return np.where(np.isnan(a), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _joined(upper: Array, lower: Array) -> Array:
    return upper.view(np.uint16).astype(np.uint32) << np.uint32(16) | lower.view(np.uint16)


def _convert(kernel: Kernel, to: str, source: str, parts: Sequence[str], operand: str) -> Read:
    read = reader(kernel, operand, source)
    if to == "bf16":
        if source != "f32" or "rn" not in parts:
            raise NotImplementedError(".".join(parts))
        return lambda machine: _bf16_of(read(machine))
    dtype = dtype_of(to)
    if source == "bf16":
        return lambda machine: (read(machine).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(dtype)
    if dtype_of(source).kind == "f" and dtype.kind in "iu":
        raise NotImplementedError(".".join(parts))
    return lambda machine: read(machine).astype(dtype)


def _pack(kernel: Kernel, kind: str, operands: Sequence[str]) -> Run:
    """mov of a number to or from several narrower ones, the lowest first."""
    target, source = operands
    names = _vector(source if "{" in source else target)
    bits = 8 * dtype_of(kind).itemsize // len(names)
    unsigned = dtype_of(kind).type
    if "{" in source:
        readers = [reader(kernel, name, f"b{bits}") for name in names]
        pieces = [lambda machine, r=read, s=i * bits: r(machine).astype(unsigned) << unsigned(s)
                  for i, read in enumerate(readers)]  # fmt: skip
        return _apply(kernel, target, lambda *given: np.bitwise_or.reduce(np.broadcast_arrays(*given)), *pieces)
    read = reader(kernel, source, kind)
    runs = [_apply(kernel, name, lambda a, s=i * bits: (a >> unsigned(s)).astype(_UNSIGNED[bits]), read)
            for i, name in enumerate(names)]  # fmt: skip

    def run(machine: Machine, mask: Array) -> None:
        for one in runs:
            one(machine, mask)

    return run


def _address(kernel: Kernel, operand: str) -> Read:
    """A register or a variable, and a constant: uint64 [threads]."""
    found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    if found is None:
        raise NotImplementedError(f"{kernel.name}: the address {operand}")
    base, offset = found[1], np.array(int(found[2] or 0), np.int64).view(np.uint64)
    read = reader(kernel, base, f"u{kernel.width(base)}" if base.startswith("%") else "u64")
    return lambda machine: np.broadcast_to(read(machine).astype(np.uint64) + offset, (machine.n,))


def _memory(kernel: Kernel, parts: Sequence[str], operands: Sequence[str]) -> Run:
    name, space, kind = parts[0], parts[1], parts[-1]
    gives = name in ("ld", "atom")
    registers = _vector(operands[0 if gives else 1])
    address = _address(kernel, operands[1 if gives else 0])
    dtype = dtype_of(kind)
    size, what = dtype.itemsize, f"{'.'.join(parts)} of {kernel.name}"
    puts = [writer(kernel, register) for register in registers] if gives else []
    takes = reader(kernel, operands[-1], kind) if name in ("atom", "red") else None
    stored = [reader(kernel, register, f"b{8 * size}") for register in registers] if name == "st" else []
    if space == "param":

        def load_parameter(machine: Machine, mask: Array) -> None:
            for i, put in enumerate(puts):
                at = address(machine).astype(np.int64)[:, None] + np.arange(i * size, (i + 1) * size)
                put(machine, machine.parameters[at].view(dtype)[:, 0], mask)

        return load_parameter
    is_sum = takes is None or ("add" in parts and dtype.kind in "iu" and space == "global")
    if space not in ("global", "shared") or not is_sum:
        raise NotImplementedError(what)

    def run(machine: Machine, mask: Array) -> None:
        active = machine.thread if mask is None else machine.thread[mask]
        found = [np.zeros(machine.n, _UNSIGNED[8 * size]) for _ in puts]
        if len(active):
            at = address(machine)[active]
            memory = machine.memory
            if space == "shared":
                memory, at = machine.shared, _in_window(machine, at, size * len(registers), active, what, name == "st")
            if machine.watch is not None and space == "global":
                machine.watch(at, size * len(registers), active)
            if takes is not None:
                given = np.broadcast_to(takes(machine), (machine.n,))[active]
                old = _add(memory, at, given, what)
                for whole in found:
                    whole[active] = old.view(whole.dtype)
            elif name == "ld":
                values = memory.load(at, size, len(puts), active, machine.clock, what)
                for whole, value in zip(found, values, strict=True):
                    whole[active] = value
            else:
                given = [np.broadcast_to(read(machine), (machine.n,))[active] for read in stored]
                memory.store(at, size, given, active, machine.clock, what)
        for put, whole in zip(puts, found, strict=True):
            put(machine, whole.view(dtype), mask)

    return run


def _add(memory: Memory, addresses: Array, given: Array, what: str) -> Array:
    """One thread after the other; gives what each of them found."""
    old = np.zeros_like(given)
    for region, inside, offsets in memory.find(addresses, given.dtype.itemsize, what):
        numbers, found = region.elements(given.dtype), []
        for place, amount in zip((offsets // given.dtype.itemsize).tolist(), given[inside], strict=True):
            found.append(numbers[place])
            numbers[place] += amount
        old[inside] = found
    return old


def _in_window(machine: Machine, addresses: Array, size: int, active: Array, what: str, stores: bool) -> Array:
    """Addresses in the shared memory of the threads' own blocks; what is read has to be written before."""
    if (addresses + np.uint64(size) > machine.shared_bytes).any():
        raise KernelError(f"{what}: outside of {machine.shared_bytes} bytes of shared memory")
    block = machine.block[active]
    each = (np.repeat(block, size), (addresses.astype(np.int64)[:, None] + np.arange(size)).ravel())
    if stores:
        machine.is_written[each] = True
    elif not machine.is_written[each].all():
        raise KernelError(f"{what}: shared memory is read that nobody has written")
    return addresses + (block << _WINDOW).astype(np.uint64)


def _of_a_warp(kernel: Kernel, parts: Sequence[str], operands: Sequence[str]) -> Run:
    members = reader(kernel, operands[-1], "u32")
    if parts[0] == "bar":

        def synchronise(machine: Machine, mask: Array) -> None:
            machine.meet(members(machine), mask)
            machine.clock.of_warp[np.unique(machine.warp if mask is None else machine.warp[mask])] += 1

        return synchronise
    kind = parts[-1]
    target, _, valid = operands[0].partition("|")
    put, put_valid = writer(kernel, target), writer(kernel, valid or "_")
    read, *others = [reader(kernel, operand, "u32" if i else kind) for i, operand in enumerate(operands[1:-1])]
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "all": np.logical_and, "any": np.logical_or}
    if parts[0] != "shfl" and parts[2] not in functions:
        raise NotImplementedError(".".join(parts))

    def run(machine: Machine, mask: Array) -> None:
        machine.meet(members(machine), mask)
        value = np.broadcast_to(read(machine), (machine.n,))
        if parts[0] == "shfl":
            source, inside = _source_lane(parts[2], machine.lane, *(o(machine).astype(np.int64) for o in others))
            put(machine, value[machine.warp * WARP + source], mask)
            put_valid(machine, inside, mask)
            return
        if mask is not None and (mask != np.repeat(mask.reshape(-1, WARP).all(1), WARP)).any():
            raise NotImplementedError(f"{'.'.join(parts)} of a part of a warp")
        function = functions[parts[2]]
        put(machine, np.repeat(function.reduce(value.reshape(-1, WARP), axis=1, dtype=value.dtype), WARP), mask)

    return run


def _source_lane(mode: str, lane: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """The lane that a shuffle reads, and whether it lies in the own segment; elsewhere it is the own lane."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    lowest = lane & segment
    bound = lowest | (clamp & ~segment)
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
    inside = source >= bound if mode == "up" else source <= bound
    return np.where(inside, source, lane), inside


def _matrix(kernel: Kernel, parts: Sequence[str], operands: Sequence[str]) -> Run:
    """ldmatrix and stmatrix .m8n8 of 16 bits: lane 8 k + i has the address of row i of matrix k, and gets, or gives,
    two neighbours in a row (transposed: in a column) of each matrix."""
    loads, transposed = parts[0] == "ldmatrix", "trans" in parts
    registers = _vector(operands[0 if loads else 1])
    address = _address(kernel, operands[1 if loads else 0])
    puts = [writer(kernel, register) for register in registers] if loads else []
    reads = [reader(kernel, register, "b32") for register in registers]
    what = f"{'.'.join(parts)} of {kernel.name}"

    def run(machine: Machine, mask: Array) -> None:
        if mask is not None:
            raise NotImplementedError(f"{what}, by a part of the threads")
        rows = address(machine)
        if (rows[machine.lane < 8 * len(registers)] % np.uint64(16)).any():
            raise KernelError(f"{what}: the address of a row is not a multiple of 16")
        first, second = machine.lane // 4, 2 * (machine.lane % 4)
        for k in range(len(registers)):
            halves = []
            for half in range(2):
                row, column = (second + half, first) if transposed else (first, second + half)
                at = rows[machine.warp * WARP + 8 * k + row] + (2 * column).astype(np.uint64)
                at = _in_window(machine, at, 2, machine.thread, what, not loads)
                if loads:
                    halves += machine.shared.load(at, 2, 1, machine.thread, machine.clock, what)
                else:
                    piece = (reads[k](machine) >> np.uint32(16 * half)).astype(np.uint16)
                    machine.shared.store(at, 2, [piece], machine.thread, machine.clock, what)
            if loads:
                puts[k](machine, _joined(halves[1], halves[0]), mask)

    return run
