"""Outcomes of an evaluation on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import argparse
import copyreg
import functools
import hashlib
import io
import itertools
import json
import os
import platform
import re
import zipfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import chain
from pathlib import Path
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    NoneType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .attacks.frozen import unwrapped
from .writing import atomic_write, explained

_DEEPEST = 100
# torch.compile sets the first two; transformers the last one, and hooks, in a model's first pass
_OF_EVERY_MODULE = {
    *vars(nn.Module()), "_compiled_call_impl", "_is_torch_compile", "_output_capturing_hooks_installed",
}  # fmt: skip
_HOOKS_OF_THE_FIRST_PASS = "transformers.utils.output_capturing"
_PLAIN = (bool, int, float, complex, str, bytes, NoneType, torch.dtype, torch.device, torch.memory_format, np.generic)
_PARTS = (slice, range)
_HOLDERS = (
    tuple, list, deque, dict, set, frozenset, Enum, Tensor, np.ndarray, SimpleNamespace, argparse.Namespace, *_PARTS,
)  # fmt: skip

_CONSTANTS = (*_PLAIN, *_PARTS, Tensor, np.ndarray, tuple, nn.Module, functools.partial)

__all__ = ["Records", "content_hash", "model_hash", "versions"]


def model_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a model's parameters and buffers, and over its settings.

    Those are what it prints, the methods and plain attributes of its modules' classes, their hooks, and those of the
    modules' attributes that are plain values (True, words, numbers, NumPy's too), callables, tensors, arrays, or lists,
    tuples, dicts, sets, slices, enums, namespaces and dataclasses of such: of `torch.nn.Upsample` align_corners, of
    `segadv.models.wrap` output. Modules that are held so, without being registered, are seen as the model is. Functions
    are seen by their byte code, the values that they hold, the functions, classes, modules and constants of their file
    that they name (lists and dicts if in capitals), and the names of what it imports; methods also by the object that
    they belong to; other callables by their class and what they hold; what `torch.jit` made as it is saved. Neither
    other objects nor the code of other files is seen, nor what a hook sets in its module or is called a cache. A model
    that counts its passes, or keeps of them what it computed, a feature map or a size say, is another one after each.
    """
    return _Describer()(unwrapped(model))


class _Describer:
    """Plain values as they are, of others a hash: tensors by their content, modules by all that `model_hash` tells,
    functions by their code and what they hold and name, of anything else its type. Whether two are one object makes no
    difference."""

    def __init__(self) -> None:
        self._described: dict[int, tuple[str, Any]] = {}
        """id -> what was said, and the object, which keeps the id its own; "..." within itself."""
        self._within: list[type] = []
        """Classes of which the members are being told."""

    def __call__(self, value: Any, depth: int = 0) -> str:
        if isinstance(value, _PLAIN):
            return hex(value) if isinstance(value, int) else repr(value)  # decimal digits may be too many
        if depth > _DEEPEST:
            return "..."
        if id(value) not in self._described:
            self._described[id(value)] = "...", value
            text = self._text(value, functools.partial(self, depth=depth + 1))
            self._described[id(value)] = hashlib.sha256(text.encode()).hexdigest(), value
        return self._described[id(value)][0]

    def _text(self, value: Any, inner: Callable[[Any], str]) -> str:
        if isinstance(value, Tensor):
            try:
                return content_hash(value)
            except (RuntimeError, TypeError, ValueError):  # of a kind whose values cannot be read: never the same
                return os.urandom(32).hex()
        if isinstance(value, np.ndarray):
            content = inner(value.tolist()) if value.dtype.hasobject else hashlib.sha256(value.tobytes()).hexdigest()
            return f"array {value.dtype} {value.shape} {content}"
        if isinstance(value, (tuple, list, deque)):
            return f"{'tuple' if isinstance(value, tuple) else 'list'} {[inner(each) for each in value]}"
        if isinstance(value, _PARTS):
            return f"{type(value)} {inner([value.start, value.stop, value.step])}"
        if isinstance(value, dict):
            return f"dict {[(inner(key), inner(each)) for key, each in value.items()]}"
        if isinstance(value, (set, frozenset)):
            return f"set {sorted(map(inner, value))}"
        if isinstance(value, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            return _as_saved(value)
        if isinstance(value, torch.ScriptObject):  # packed weights of a quantised layer
            try:
                return f"{type(value)} {inner(value.__getstate__())}"
            except RuntimeError:  # none that can be saved: never the same
                return os.urandom(32).hex()
        if isinstance(value, nn.Module):
            return self._of_network(value, inner)
        if isinstance(value, CodeType):
            count = value.co_argcount
            arguments = f"{count} {value.co_varnames[: count + value.co_kwonlyargcount]}"
            return f"code {value.co_code.hex()} {value.co_names} {arguments} {inner(value.co_consts)}"
        if isinstance(value, FunctionType):
            held = [value.__code__, value.__defaults__, value.__kwdefaults__, *map(_held, value.__closure__ or ())]
            named = {
                name: self.members(each, inner) if isinstance(each, type) else inner(each)
                for name, each in _named_by(value).items()
            }
            return f"function {inner(held)} {named}"
        if isinstance(value, functools.partial | functools.partialmethod):
            return f"partial {inner([value.func, value.args, value.keywords])}"
        if isinstance(value, MethodType):
            owner = value.__self__
            if _is_described(owner) or _is_part_of(type(owner), "torch"):  # such as the state of `fully_shard`
                return f"method {inner([value.__func__, owner])}"
            return f"method {inner(value.__func__)} {self._of_object(owner, inner)}"
        built_in = isinstance(value, (BuiltinMethodType, MethodWrapperType))
        if built_in and not isinstance(value.__self__, (type, ModuleType, NoneType)):  # of a tensor, say
            return f"method {value.__name__} {inner(value.__self__)}"
        if isinstance(value, (staticmethod, classmethod)):
            return f"method {inner(value.__func__)}"
        if isinstance(value, property):
            return f"property {inner(value.fget)}"
        if isinstance(value, functools.cached_property):
            return f"property {inner(value.func)}"
        if isinstance(value, Enum):
            return f"{type(value)} {value.name} {inner(value.value)}"
        if isinstance(value, (SimpleNamespace, argparse.Namespace)):
            return f"{type(value)} {inner(vars(value))}"
        if _is_record(value):
            return f"{type(value)} {inner({entry.name: getattr(value, entry.name, None) for entry in fields(value)})}"
        if isinstance(value, type):
            return repr(value)
        if callable(value):  # built in, or an object that can be called
            return self._of_object(value, inner)
        return str(type(value))

    def _of_network(self, network: nn.Module, inner: Callable[[Any], str]) -> str:
        settings = [_without_addresses(network)]
        for name, module in network.named_modules(remove_duplicate=False):
            if isinstance(module, torch.jit.ScriptModule):
                settings.append(f"{name} {inner(module)}")
                continue
            hooks = [
                hook
                for kind in (
                    module._forward_pre_hooks,
                    module._forward_hooks,
                    module._backward_pre_hooks,
                    module._backward_hooks,
                )
                for hook in kind.values()
                if getattr(hook, "__module__", None) != _HOOKS_OF_THE_FIRST_PASS
            ]
            settings.append(f"{name} {type(module)} {self.members(type(module), inner)} {inner(hooks)}")
            if _is_part_of(type(module), "torch._dynamo"):  # around a compiled model, whose attributes come in turn
                continue
            # weights of weight_norm, spectral_norm and prune
            computed = {getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in hooks}
            for key, value in sorted(vars(module).items()):
                of_torch = key in _OF_EVERY_MODULE or key.startswith("__composable_api")  # the latter of fully_shard
                is_cached = isinstance(getattr(type(module), key, None), functools.cached_property) or "cache" in key
                if _is_described(value) and not (of_torch or is_cached or key in computed or value is None):
                    settings.append(f"{name}.{key} {inner(value)}")
        digest = hashlib.sha256("\n".join(settings).encode())
        named = (network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
        for name, value in chain(*named):
            digest.update(f"{name} {content_hash(value)}\n".encode())
        return digest.hexdigest()

    def _of_object(self, value: Any, inner: Callable[[Any], str]) -> str:
        slots = copyreg._slotnames(type(value))  # type: ignore[attr-defined]  # private ones under their real names
        attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        attributes |= getattr(value, "__dict__", None) or {}
        # what no_grad and autocast, as decorators, found the last time
        holds = inner({name: each for name, each in attributes.items() if not str(name).startswith("prev")})
        return f"{_without_addresses(value)} {self.members(type(value), inner)} {holds}"

    def members(self, kind: type, inner: Callable[[Any], str]) -> str:
        """What a class and those above it are made of, but for what torch's and Python's versions decide."""
        if kind in self._within:
            return "..."
        self._within.append(kind)
        found = []
        for each in kind.__mro__:
            if _is_part_of(each, "torch", "builtins", "functools"):
                continue
            for name, value in sorted(vars(each).items()):
                if isinstance(value, type) and value.__qualname__.startswith(f"{each.__qualname__}."):
                    found.append(f"{name} {self.members(value, inner)}")
                elif "cache" not in name and (callable(value) or not name.startswith("__")):
                    found.append(f"{name} {inner(value)}")
        self._within.pop()
        return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _without_addresses(value: Any) -> str:
    try:
        return re.sub("0x[0-9a-f]+", "", repr(value))
    except Exception:  # whatever a class of the user's raises: never the same
        return os.urandom(32).hex()


def _is_part_of(value: Any, *packages: str) -> bool:
    module = f"{getattr(value, '__module__', None)}."
    return any(module.startswith(f"{package}.") for package in packages)


def _as_saved(scripted: torch.jit.ScriptModule | torch.jit.ScriptFunction) -> str:
    try:
        saved = scripted.save_to_buffer()  # type: ignore[call-arg]
    except RuntimeError:  # with operations that cannot be saved: never the same
        return os.urandom(32).hex()
    digest = hashlib.sha256()
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith((".debug_pkl", "serialization_id")):  # others in every process
                digest.update(f"{name} {hashlib.sha256(archive.read(name)).hexdigest()}\n".encode())
    return digest.hexdigest()


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _is_described(value: Any) -> bool:
    """Whether more is told of it than its type."""
    return isinstance(value, (*_PLAIN, *_HOLDERS, torch.ScriptObject)) or callable(value) or _is_record(value)


def _named_by(function: FunctionType) -> dict[str, Any]:
    """Functions, classes, modules and constants of its file; of other files' functions and classes where they are."""
    if _is_part_of(function, "torch"):
        return {}
    found = {name: function.__globals__.get(name) for name in sorted(_names(function.__code__))}
    named: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, _CONSTANTS) or _is_record(value):
            named[name] = value
        elif isinstance(value, _HOLDERS):
            if name.isupper():  # others come and go, as registries and caches
                named[name] = value
        elif callable(value):
            file, qualname = (getattr(value, key, None) for key in ("__module__", "__qualname__"))
            named[name] = value if file == function.__module__ else f"{file} {qualname}"
    return named


def _names(code: CodeType) -> set[str]:
    """Those of comprehensions, lambdas and functions within, too."""
    return {*code.co_names}.union(*(_names(each) for each in code.co_consts if isinstance(each, CodeType)))


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
            parts = content_hash(*(getattr(tensor, name) for name in names))
            digest.update(f"{_without_addresses(described)} {parts}".encode())
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
