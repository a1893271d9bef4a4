"""Outcomes of an evaluation on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .attacks.base import unwrapped
from .writing import atomic_write, explained

_DEEPEST = 8
# transformers sets the last one in a model's first pass
_OF_EVERY_MODULE = {*vars(nn.Module()), "_compiled_call_impl", "_output_capturing_hooks_installed"}

__all__ = ["Records", "content_hash", "model_hash", "versions"]


def model_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a model's parameters and buffers, and over its settings.

    Those are what it prints, its modules' `forward`, and those of their attributes that are True, False, words, floats,
    callables, tensors, or lists, tuples and dicts of such: of `torch.nn.Upsample` align_corners, of
    `segadv.models.wrap` output. Functions are seen by their byte code and the plain values that they hold, other
    callables by what they print and hold. Neither other code nor other attributes are seen: a whole number by itself
    may be a counter, and what a hook sets or is called a cache comes from an earlier pass, if there was one. A model
    that keeps what it computed elsewhere, a feature map say, is another one after each pass.
    """
    network = unwrapped(model)
    settings = [repr(network)]
    for name, module in network.named_modules(remove_duplicate=False):
        settings.append(f"{name} {_described(getattr(type(module), 'forward', None))}")
        # weights of weight_norm, spectral_norm and prune
        hooks = module._forward_pre_hooks.values()
        computed = {getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in hooks}
        for key, value in sorted(vars(module).items()):
            told = isinstance(value, (bool, str, float, tuple, list, dict, Tensor)) or callable(value)
            from_a_pass = key in computed or "cache" in key
            if told and not from_a_pass and not isinstance(value, nn.Module) and key not in _OF_EVERY_MODULE:
                settings.append(f"{name}.{key} {_described(value)}")
    # without addresses in memory
    digest = hashlib.sha256(re.sub("0x[0-9a-f]+", "", "\n".join(settings)).encode())
    named = (network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
    for name, value in chain(*named):
        digest.update(f"{name} {content_hash(value)}\n".encode())
    return digest.hexdigest()


def _described(value: Any, depth: int = 0) -> str:
    """Plain values as they are, tensors by their content, functions by their byte code and what they hold, of anything
    else its type."""
    if depth > _DEEPEST:  # a function that holds itself
        return "..."
    inner = functools.partial(_described, depth=depth + 1)
    if isinstance(value, FunctionType):
        held = [value.__code__, value.__defaults__, value.__kwdefaults__, *map(_held, value.__closure__ or ())]
        return f"function {inner(held)}"
    if isinstance(value, CodeType):
        return f"{value.co_code.hex()} {value.co_names} {inner(value.co_consts)}"
    if isinstance(value, functools.partial):
        return f"partial {inner([value.func, value.args, value.keywords])}"
    if isinstance(value, MethodType):
        return f"method {inner([value.__func__, value.__self__])}"
    if callable(value) and not isinstance(value, nn.Module):  # built in, a class, or an object that can be called
        return f"{value!r} {inner(getattr(value, '__dict__', None) if not isinstance(value, type) else None)}"
    if isinstance(value, Tensor):
        try:
            return content_hash(value)
        except (RuntimeError, TypeError, ValueError):  # of a kind whose values cannot be read: never the same
            return os.urandom(32).hex()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(inner, value))}]"
    if isinstance(value, dict):
        return inner([entry for item in value.items() for entry in item])
    if isinstance(value, (set, frozenset)):
        return inner(sorted(map(inner, value)))
    return repr(value) if isinstance(value, (bool, int, float, complex, str, bytes, NoneType)) else str(type(value))


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def content_hash(*tensors: Tensor) -> str:
    """SHA-256 over types, shapes and values; one without values, on the device meta, is never the same."""
    digest = hashlib.sha256()
    for tensor in tensors:
        gather = getattr(tensor, "full_tensor", None)
        if gather is not None:  # of `fully_shard`: all processes take part
            tensor = gather()
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.is_meta:  # offloaded weights, say
            digest.update(os.urandom(32))
            continue
        if is_traceable_wrapper_subclass(tensor):  # the quantised weights of other packages
            names, described = tensor.__tensor_flatten__()
            described = re.sub("0x[0-9a-f]+", "", str(described))
            digest.update(f"{described} {content_hash(*(getattr(tensor, name) for name in names))}".encode())
            continue
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        if tensor.layout is torch.sparse_coo:  # its entries may stand in any order; memory may not hold them all
            entries = tensor.detach().coalesce()
            digest.update(content_hash(entries.indices(), entries.values()).encode())
            continue
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        # a copy: memory that NumPy has seen can no longer be resized, as `fully_shard` does with its weights'
        values = tensor.detach().cpu().resolve_conj().clone(memory_format=torch.contiguous_format)
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    from . import __version__

    return {
        "segadv": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


class Records:
    """One file for each attack, eps and batch, found again by a hash of all that its content depends on.

    Args:
        folder: None keeps nothing.
        identity: what all outcomes depend on, fit for JSON: model, seed, versions.
        approve: (attack, eps) -> whether what was computed is written; called before anything is. What it raises
            keeps that from happening as well.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, identity: Mapping[str, Any], approve: Callable[[str, float], bool]
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.identity = identity
        self.approve = approve
        if self.folder is not None:
            with explained(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)

    def outcomes(
        self, attack: str, eps: Sequence[float], depends_on: Sequence[Any], compute: Callable[[], Tensor]
    ) -> Tensor:
        """Confusion matrices, int64 [eps, steps, N, C, C] on the CPU: read, or computed and written.

        Args:
            attack, eps: for the names of the files.
            depends_on: for each eps what its outcomes depend on, fit for JSON. Empty: they are not kept.
            compute: gives them.
        """
        if self.folder is None or not depends_on:
            return compute().cpu()
        paths = [self._path(attack, value, key) for value, key in zip(eps, depends_on, strict=True)]
        found = [matrices for path in paths if (matrices := _read(path)) is not None]
        if len(found) == len(paths):
            return torch.stack(found)
        outcomes = compute().cpu()
        approved = [self.approve(attack, value) for value in eps]
        for path, matrices in itertools.compress(zip(paths, outcomes, strict=True), approved):
            with atomic_write(path) as temporary:
                np.savez_compressed(temporary, outcomes=matrices.numpy())
        return outcomes

    def _path(self, attack: str, eps: float, key: Any) -> Path:
        assert self.folder is not None
        digest = hashlib.sha256(json.dumps([self.identity, key], sort_keys=True).encode()).hexdigest()
        return self.folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', attack)[:100]}-{eps:g}-{digest[:20]}.npz"


def _read(path: Path) -> Tensor | None:
    """None where there is no file, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as content:
            outcomes = torch.from_numpy(content["outcomes"])
    except MemoryError:
        raise
    except Exception:  # whatever a damaged file makes zip, zlib and NumPy raise
        return None
    return outcomes if outcomes.dtype == torch.int64 and outcomes.dim() == 4 else None
