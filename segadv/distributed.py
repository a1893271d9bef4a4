"""Training with several processes: the group that torchrun starts, and the few things the trainer asks of it.

Without a group all of it is there and means one process.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "add_up",
    "averaging_gradients",
    "explained",
    "from_first",
    "gather",
    "leave",
    "process_group",
    "rank",
    "started",
    "world_size",
]

_TIMEOUT = timedelta(minutes=10)
"""For a process that hangs. One that ends is noticed at once: its connections break, and torchrun stops the others."""

T = TypeVar("T")


def rank() -> int:
    """Number of this process, from 0; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def started() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Joins the processes that torchrun started, for the length of the block; alone it does nothing.

    Args:
        device: "auto", "cuda" (NCCL; each process takes the GPU of its number on its machine) or "cpu" (gloo).

    Raises:
        ValueError: a GPU by number, or more processes than GPUs.
    """
    if started() == 1 or dist.is_initialized():
        yield
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if device not in ("auto", "cuda"):
            raise ValueError(f'device must be "auto", "cuda" or "cpu" with several processes, got {device!r}')
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine finds no GPU of its own, there are {torch.cuda.device_count()}: "
                "give torchrun a smaller --nproc-per-node"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT)
    yield
    # What is left of a DistributedDataParallel keeps the group's threads, and one of these that wants the interpreter
    # while that ends aborts the process.
    gc.collect()
    dist.destroy_process_group()  # not after an error: it would wait for processes that have ended


def leave(status: int) -> None:
    """Ends this process; one of several at once, when its work is done and written.

    A thread of gloo that wants the interpreter while that ends would abort the process, and torchrun call the whole
    job failed.
    """
    if started() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextmanager
def explained(continues: str) -> Iterator[None]:
    """A collective that failed because another process ended says so, and how the work `continues`."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors are plain RuntimeErrors, which name a source file of gloo
        if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RuntimeError(
            f"process {rank()} of {world_size()} stops: another process ended or cannot be reached any more, its own "
            f"message tells why; {continues} ({str(error).splitlines()[0]})"
        ) from error


def averaging_gradients(module: nn.Module) -> DistributedDataParallel:
    """The module with gradients that are averaged over the processes, and nothing else communicated."""
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # from torch 2.13 on
    options: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **options)


def add_up(value: Tensor) -> Tensor:
    """The sum over all processes; on a GPU it is only queued."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def gather(value: T) -> list[T]:
    """The values of all processes, for all of them. Waits for the device."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(call: Callable[[], T]) -> T:
    """Calls it in the first process only, and returns or raises in all of them what came of it there."""
    if world_size() == 1:
        return call()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = call()
        except Exception as raised:
            outcome[1] = raised
    dist.broadcast_object_list(outcome, src=0)
    value, error = outcome
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]
