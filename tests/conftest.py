"""Fixtures shared by all tests. One test body serves every backend through the `backend` fixture."""

from __future__ import annotations

import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Threads that wait spinning take the core from those they wait for, where other processes run, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

# For benchmarks/; as the last place, so that it is the installed segadv that is tested.
sys.path.append(str(Path(__file__).parents[1]))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

COMPILED = os.environ.get("SEGADV_TEST_COMPILED")  # see compiled.py
GPU = torch.cuda.is_available() and not COMPILED
if not (GPU or COMPILED):  # Triton reads it when it is imported: then its kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

import compiled  # noqa: E402
import emulated  # noqa: E402
import interpreter  # noqa: E402

import segadv  # noqa: E402
from segadv.compat import import_torchvision  # noqa: E402
from segadv.ops import backends, native  # noqa: E402

if not (GPU or COMPILED):
    interpreter.make_faster()
import_torchvision()  # before a test imports torchmetrics, transformers or timm, which import it where it is there


# All run on the CPU, Triton in its interpreter; where there is a GPU, Triton on it, and the native backend on both.
BACKENDS = ("native", "reference", "triton", "cuda-emulated")
if not COMPILED:
    backends.BACKENDS["cuda-emulated"] = emulated.EmulatedKernels(emulated.load())
else:
    BACKENDS = ("triton", "cuda-emulated") if compiled.nvcc() else ("triton",)
    backends.BACKENDS["triton"] = compiled.CompiledTriton()
    if compiled.nvcc():
        backends.BACKENDS["cuda-emulated"] = compiled.CompiledCuda()
NATIVE_ON_GPU = "native-on-gpu"
# The native backend with the instructions of lesser machines: not everywhere, its other code is the same.
lesser = native.core.instruction_sets()[1:] if native.core and not COMPILED else []
LESSER = {f"native-{name}": name for name in lesser}
BACKENDS += tuple(LESSER)
OF_INSTRUCTIONS = ("test_margin.py", "test_cross_entropy.py", "test_confusion.py", "test_step.py")
ON_GPU = ("triton", NATIVE_ON_GPU) if GPU else ()
if GPU and backends.BACKENDS["native"].unavailable("cuda") is None:
    BACKENDS += (NATIVE_ON_GPU,)

# The interpreter takes about 20 us for every operation of a kernel, the emulation 1 us for a thread that waits for
# others: fewer and smaller random cases suffice them. On a GPU Triton compiles 15 kernels for a case: fewer, too.
SLOW = ("cuda-emulated",) if GPU else ("triton", "cuda-emulated")
FEW = ("triton", "cuda-emulated")
FEW_SEEDS = 1 if COMPILED == "few" else 4
NOT_RANDOM = (torch.float64, torch.float16) if COMPILED == "few" else ()  # types without random cases
OTHER_SEEDS = (torch.bfloat16, torch.float64)  # the interpreter takes odd seeds for these types, even ones for others
SLOW_SIZE = 12


def pytest_configure(config: pytest.Config) -> None:
    for name in set(BACKENDS) - {NATIVE_ON_GPU, *LESSER}:
        reason = backends.BACKENDS[name].unavailable("cuda" if name in ON_GPU else "cpu")
        if reason is not None:
            raise pytest.UsageError(f"the tests need the backend {name!r}, they never fall back: {reason}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def too_many(item: pytest.Item) -> bool:
        parameters = getattr(item, "callspec", None)
        if parameters is not None and parameters.params.get("backend") in LESSER:
            return item.path.name not in OF_INSTRUCTIONS
        if parameters is None or parameters.params.get("backend") not in FEW:
            return False
        seed, dtype = parameters.params.get("seed"), parameters.params.get("dtype")
        if seed is None:
            return False
        interpreted = parameters.params["backend"] == "triton" and not (GPU or COMPILED)
        if interpreted and dtype is not None and seed % 2 != (dtype in OTHER_SEEDS):
            return True
        return seed >= FEW_SEEDS or dtype in NOT_RANDOM

    left_out = [item for item in items if too_many(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def drawn_on_the_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.rand and the like, whose numbers are the same ones on every default device: bounds are tried with them."""

    def drawn(*args: Any, requires_grad: bool = False, **options: Any) -> Tensor:
        if "device" in options or "generator" in options:
            return draw(*args, requires_grad=requires_grad, **options)
        return draw(*args, device="cpu", **options).to(torch.get_default_device()).requires_grad_(requires_grad)

    return drawn


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on every backend; its tensors are made on the GPU where the backend runs there."""
    name = "native" if request.param in {NATIVE_ON_GPU, *LESSER} else request.param
    torch.set_default_device("cuda" if request.param in ON_GPU else None)
    if request.param in ON_GPU:
        torch.utils._device._device_constructors()  # a list made once, of the genuine ones
        for draw in (torch.rand, torch.randn, torch.randint):
            monkeypatch.setattr(torch, draw.__name__, drawn_on_the_cpu(draw))
    best = native.core.instruction_set() if native.core else None
    try:
        if request.param in LESSER:
            native.core.use_instruction_set(LESSER[request.param])
        with segadv.backend(name):
            yield name
    finally:
        torch.set_default_device(None)
        if best:
            native.core.use_instruction_set(best)


@pytest.fixture
def slow(backend: str) -> bool:
    """Whether the backend interprets or emulates a GPU."""
    return backend in SLOW


@pytest.fixture
def interpreted(backend: str) -> bool:
    """Whether the backend is Triton in its interpreter, whose arithmetic is not a GPU's everywhere."""
    return backend == "triton" and not (GPU or COMPILED)


@pytest.fixture
def largest(slow: bool) -> int:
    """The largest height and width of random cases."""
    return SLOW_SIZE if slow else 40


@pytest.fixture(autouse=True)
def _same_random_numbers(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    # The order of the emulated threads: every test has its own, the same on every run.
    if not COMPILED:
        emulated.load().seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For comparing bits with other processes, which have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
