"""Training with several processes: the group that torchrun starts, and the few things the trainer asks of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["process_group", "rank", "world_size"]


def rank() -> int:
    """Number of this process, from 0; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Joins the processes that torchrun started, for the length of the block; alone it does nothing.

    Args:
        device: "auto", "cuda" (each process takes the GPU of its number on its machine) or "cpu".
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    cuda = torch.cuda.is_available() if device == "auto" else torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
    yield
    dist.destroy_process_group()
