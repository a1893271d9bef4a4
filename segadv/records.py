"""Outcomes of an evaluation on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from itertools import chain
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, NoneType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .attacks.base import unwrapped
from .writing import atomic_write, explained

_DEEPEST = 32
# transformers sets the last one, and hooks, in a model's first pass
_OF_EVERY_MODULE = {*vars(nn.Module()), "_compiled_call_impl", "_output_capturing_hooks_installed"}
_HOOKS_OF_THE_FIRST_PASS = "transformers.utils.output_capturing"
_PLAIN = (bool, int, float, complex, str, bytes, NoneType, torch.dtype, torch.device, torch.memory_format, np.generic)
_HOLDERS = (tuple, list, dict, set, frozenset, Tensor, np.ndarray, SimpleNamespace, argparse.Namespace)
_OF_THE_VERSIONS = ("builtins", "torch")

__all__ = ["Records", "content_hash", "model_hash", "versions"]


def model_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a model's parameters and buffers, and over its settings.

    Those are what it prints, the methods and plain attributes of its modules' classes, their forward hooks, and those
    of the modules' attributes that are plain values (True, words, numbers, NumPy's too), callables, tensors, arrays,
    or lists, tuples, dicts, sets, namespaces and dataclasses of such: of `torch.nn.Upsample` align_corners, of
    `segadv.models.wrap` output. Functions are seen by their byte code, the values that they hold, and the functions and
    plain values of their module that they name; other callables by what they print and hold. Neither other objects nor
    other modules' functions are seen, nor what a hook sets or is called a cache. A model that counts its passes, or
    keeps what it computed (a feature map, say), is another one after each.
    """
    network = unwrapped(model)
    described = _Describer()
    settings = [repr(network)]
    for name, module in network.named_modules(remove_duplicate=False):
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        lasting = [hook for hook in hooks if getattr(hook, "__module__", None) != _HOOKS_OF_THE_FIRST_PASS]
        settings.append(f"{name} {described.class_of(module)} {described(lasting)}")
        # weights of weight_norm, spectral_norm and prune
        computed = {getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in hooks}
        for key, value in sorted(vars(module).items()):
            told = value is not None and (
                isinstance(value, (*_PLAIN, *_HOLDERS)) or callable(value) or _is_record(value)
            )
            from_a_pass = key in computed or "cache" in key
            if told and not from_a_pass and not isinstance(value, nn.Module) and key not in _OF_EVERY_MODULE:
                settings.append(f"{name}.{key} {described(value)}")
    # without addresses in memory
    digest = hashlib.sha256(re.sub("0x[0-9a-f]+", "", "\n".join(settings)).encode())
    named = (network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
    for name, value in chain(*named):
        digest.update(f"{name} {content_hash(value)}\n".encode())
    return digest.hexdigest()


class _Describer:
    """Plain values as they are, tensors by their content, functions by their code and what they hold and name, of
    anything else its type. What was described before is named by its number."""

    def __init__(self) -> None:
        self.before: dict[int, tuple[int, Any]] = {}
        """id -> number, and the object, which keeps the id its own."""

    def __call__(self, value: Any, depth: int = 0) -> str:
        if isinstance(value, _PLAIN):
            return repr(value)
        if depth > _DEEPEST:
            return "..."
        if isinstance(value, Tensor):
            try:
                return content_hash(value)
            except (RuntimeError, TypeError, ValueError):  # of a kind whose values cannot be read: never the same
                return os.urandom(32).hex()
        inner = functools.partial(self, depth=depth + 1)
        if isinstance(value, tuple):  # which of them are one object is the interpreter's choice
            return f"({', '.join(map(inner, value))})"
        if id(value) in self.before:
            return f"#{self.before[id(value)][0]}"
        self.before[id(value)] = len(self.before), value
        if isinstance(value, list):
            return f"[{', '.join(map(inner, value))}]"
        if isinstance(value, dict):
            return inner([entry for item in value.items() for entry in item])
        if isinstance(value, (set, frozenset)):
            return f"{{{', '.join(sorted(_Describer()(each, depth + 1) for each in value))}}}"
        if isinstance(value, np.ndarray):
            return inner([str(value.dtype), value.shape, value.tolist() if value.dtype.hasobject else value.tobytes()])
        if isinstance(value, CodeType):
            return f"{value.co_code.hex()} {value.co_names} {inner(value.co_consts)}"
        if isinstance(value, FunctionType):
            held = [value.__code__, value.__defaults__, value.__kwdefaults__, *map(_held, value.__closure__ or ())]
            return f"function {inner(held)} {inner(_named_by(value))}"
        if isinstance(value, functools.partial):
            return f"partial {inner([value.func, value.args, value.keywords])}"
        if isinstance(value, MethodType):
            return f"method {inner([value.__func__, value.__self__])}"
        if isinstance(value, (staticmethod, classmethod)):
            return f"method {inner(value.__func__)}"
        if isinstance(value, property):
            return f"property {inner(value.fget)}"
        if isinstance(value, (SimpleNamespace, argparse.Namespace)) or _is_record(value):
            return f"{type(value)} {inner(vars(value))}"
        if callable(value) and not isinstance(value, nn.Module):  # built in, a class, or an object that can be called
            return f"{value!r} {inner(getattr(value, '__dict__', None) if not isinstance(value, type) else None)}"
        return str(type(value))

    def class_of(self, module: nn.Module) -> str:
        """What the module's class is made of, but for what torch's version decides."""
        classes = [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] not in _OF_THE_VERSIONS]
        found = [
            (name, value)
            for kind in classes
            for name, value in sorted(vars(kind).items())
            if "cache" not in name and (callable(value) or not name.startswith("__"))
        ]
        return f"{type(module)} {self(found)}"


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")


def _named_by(function: FunctionType) -> dict[str, Any]:
    """Functions and plain values of its module."""
    if function.__module__ is None or function.__module__.partition(".")[0] in _OF_THE_VERSIONS:
        return {}
    found = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, (*_PLAIN, tuple, Tensor, np.ndarray))
        or (isinstance(value, FunctionType) and value.__module__ == function.__module__)
    }


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
        approve: (attack, eps) -> whether what was computed is written.
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
            compute: gives them. What it raises keeps them from being written.
        """
        if self.folder is None or not depends_on:
            return compute()
        paths = [self._path(attack, value, key) for value, key in zip(eps, depends_on, strict=True)]
        found = [matrices for path in paths if (matrices := _read(path)) is not None]
        if len(found) == len(paths):
            return torch.stack(found)
        outcomes = compute()
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
