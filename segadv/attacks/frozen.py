"""A model as attacks and evaluations see it: left as it was, without its wrapper, and asked for its logits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

__all__ = [
    "device_of",
    "explain_float64",
    "frozen",
    "is_expanded",
    "logits_of",
    "model_logits",
    "unwrapped",
    "uses_batch",
]

_TOGETHER = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
"""Buffers of these types are copied many at a time."""


_IN_PLACE = (
    "model: it changes its input in place (x.sub_(mean), x -= mean, inplace=True), and with it the caller's images; "
    "write x = x - mean, or give segadv.models.wrap mean and std"
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel wrapper; any other module as it is.

    A gradient taken through the wrapper would leave its reducer waiting. A compiled module stays compiled; a
    wrapper that was compiled as a whole gives its module, not compiled.
    """
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, DistributedDataParallel):
        module: nn.Module = inner.module
        return module
    return model


def device_of(model: nn.Module) -> torch.device | None:
    """That of its parameters; None where it has none. Offloaded ones, which are on the device meta, do not tell."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)


def _forward(model: nn.Module, images: Tensor) -> Any:
    """model(images); ValueError where it changes the images in place, which are the caller's."""
    if images.is_inference():  # changes of such tensors are not counted
        return model(images.clone())
    version = images._version
    try:
        output = model(images)
    except RuntimeError as error:
        if "leaf Variable" in str(error):  # such a change, where they require a gradient
            raise ValueError(f"{_IN_PLACE}. Or it changes another tensor that requires a gradient") from error
        explain_float64(error, model, images)
        raise
    if images._version != version:
        raise ValueError(_IN_PLACE)
    return output


def explain_float64(error: RuntimeError, model: nn.Module, images: Tensor) -> None:
    """ValueError instead of an error that comes of images in float64; not where the model itself is."""
    in_float64 = any(parameter.dtype is torch.float64 for parameter in model.parameters())
    if images.dtype is torch.float64 and not in_float64 and "double" in str(error).lower():
        raise ValueError("images must be of a dtype that the model takes, got float64; images.float() helps") from error


def logits_of(model: nn.Module, images: Tensor, extract: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The logits of a forward pass that starts no collective; see `unwrapped` and `model_logits`."""
    return model_logits(_forward(unwrapped(model), images), extract)


def model_logits(output: Any, extract: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The logits in what a model returned.

    Args:
        output: a tensor; a dict with "out" or "logits"; an object with `.logits`; a tuple or list whose first
            entry is the logits.
        extract: callable from `output` to the logits, instead of all that.

    Raises:
        TypeError: no tensor was found; the message names what there was.
    """
    logits = output
    if extract is not None:
        logits = extract(output)
    elif isinstance(output, Mapping):
        logits = output.get("logits") if output.get("out") is None else output["out"]
    elif not isinstance(output, Tensor):
        if hasattr(output, "logits"):
            logits = output.logits
        elif isinstance(output, (tuple, list)) and output:
            logits = output[0]
    if isinstance(logits, Tensor):
        return logits
    if extract is not None:
        raise TypeError(f"output must return a tensor, the logits, got {_kind(logits)}")
    raise TypeError(
        f"model: it returned {_kind(output)}; understood are a tensor, a dict with 'out' or 'logits', an "
        "object with .logits and a tuple whose first entry is the logits. Wrap it: segadv.models.wrap(model, "
        "output=...), a callable from what the model returns to the logits; attacks take output= themselves, too"
    )


def _kind(output: Any) -> str:
    name = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {name} with the keys {list(output)}"
    if isinstance(output, (tuple, list)):
        return f"a {name} of {[type(entry).__name__ for entry in output]}"
    return f"a {name}"


@contextmanager
def frozen(model: nn.Module, *, bn: str = "eval") -> Iterator[None]:
    """Inside the block the model is in eval mode and builds no graph for its weights; then it is as before.

    Restored, also after an exception, are the `training` flag of every module, every buffer, `requires_grad` of every
    parameter, and the weights that hooks compute before each forward (`torch.nn.utils.weight_norm`, `spectral_norm`,
    `prune`). `.grad` is not touched; what a model's own code or hooks keep elsewhere is not restored. (Buffers that a
    model creates lazily, at its first or its largest input, are discarded afterwards. If the model records elsewhere
    that they exist, run it once on such an input before.)

    With bn="train" a norm layer that the caller has in train mode and that keeps running statistics uses the
    batch's own, as the training forward does, and writes nothing. Norm layers in eval mode (frozen ones, or a
    model in eval mode as a whole) go on using their running statistics. SyncBatchNorm takes the statistics of
    its own process: nothing is communicated, so the processes may attack different numbers of images.

    With `fully_shard` the parameters keep `requires_grad`, which it reads in its very first pass and copies to weights
    that it gathers in one pass and frees in another. So the graph of the weights takes memory, compiled parts and
    custom Functions compute weight gradients for nothing, and gradients that it has not reduced yet, or is told to
    reduce without need (`set_reduce_scatter_unused_params`), are in `.grad` after an attack.

    Raises:
        ValueError: a DistributedDataParallel wrapper inside the model, where no attack can go around it, or a
            FullyShardedDataParallel one, which allows no gradient of its input; parameters or buffers that have no
            shape yet, or were made under inference_mode, through which no gradient passes; bn="train" with a
            ScriptModule.
    """
    network = unwrapped(model)
    training: dict[nn.Module, bool] = {}
    registered: dict[nn.Module, dict[str, Tensor | None]] = {}
    computed: dict[nn.Module, dict[str, Tensor]] = {}
    required: list[tuple[nn.Module, str, Tensor, bool]] = []
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it, there is no model of its
    is_sharded = False
    for name, module in network.named_modules():  # once: named_parameters and named_buffers would walk again
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"model: its part {name!r} is a DistributedDataParallel; give the attack the module inside of it, or "
                "wrap the whole model"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "model: FullyShardedDataParallel lets no torch.autograd.grad to the images through; shard it with "
                "torch.distributed.fsdp.fully_shard, where every process has to attack with equally many passes"
            )
        is_sharded = is_sharded or (fsdp is not None and isinstance(module, fsdp.FSDPModule))
        if hasattr(module, "training"):  # not after torch.jit.freeze
            training[module] = module.training
        registered[module] = buffers = dict(module._buffers.items())
        if module._forward_pre_hooks:
            computed[module] = {own: value for own, value in vars(module).items() if isinstance(value, Tensor)}
        for own, tensor in chain(module._parameters.items(), buffers.items()):
            if is_lazy(tensor):
                raise ValueError(
                    f"model: its parameter or buffer {f'{name}.{own}'.lstrip('.')!r} has no shape yet; show the model "
                    "a batch before"
                )
            if tensor is not None and tensor.is_inference():
                raise ValueError(
                    f"model: its parameter or buffer {f'{name}.{own}'.lstrip('.')!r} was made under "
                    "torch.inference_mode, so that no gradient passes through it; build or load the model outside of "
                    "that"
                )
        for own, parameter in module._parameters.items():
            # one that the caller computed, for functional_call say, is no leaf and stays as it is
            if parameter is not None and parameter.is_leaf:
                required.append((module, own, parameter, parameter.requires_grad))
    own_statistics = [module for module in training if bn == "train" and uses_batch(module)]
    for module in own_statistics:
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError('bn must be "eval" with a ScriptModule, whose norm layers cannot be switched, got "train"')
    # What a model writes to its buffers cannot be told: batch_norm, NumPy and .data leave no trace.
    saved = _SavedBuffers(buffer for own in registered.values() for buffer in own.values() if buffer is not None)
    with ExitStack() as stack:  # whatever the model did, each of these is done
        stack.callback(saved.restore)
        stack.callback(_restore_registered, registered)
        stack.callback(_restore_computed, computed)
        for module in own_statistics:
            # In eval mode and without running statistics a norm layer takes its input's, and counts nothing.
            stack.callback(setattr, module, "track_running_stats", True)
            module.track_running_stats = False  # type: ignore[assignment]
            module.running_mean = module.running_var = None  # type: ignore[assignment]
        stack.callback(_set_training, training)
        _set_training(dict.fromkeys(training, False))
        if is_sharded:
            required.clear()
        stack.callback(_restore_required, required)
        for *_, parameter, _ in required:
            _require_grad(parameter, False)
        # parametrize.cached() of the caller's: weights computed here have no graph, and must not stay there
        stack.callback(setattr, parametrize, "_cache", parametrize._cache)
        parametrize._cache = {}
        yield


class _SavedBuffers:
    """Copies of buffers. Those of norm layers, three in each, take a few kernels on a GPU instead of one for each."""

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        # torch lets nobody write to an expanded one
        self._buffers = [buffer for buffer in dict.fromkeys(buffers) if not is_expanded(buffer)]
        # `.data` shares the memory: a graph of the caller's that has saved a buffer goes on being valid. Of a sparse
        # tensor in coordinates it would be the memory of now, which no change stays in.
        self._data = [buffer if buffer.layout is torch.sparse_coo else buffer.data for buffer in self._buffers]
        self._alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        self._others: list[tuple[Tensor, Tensor]] = []
        for data in self._data:
            if _is_plain(data):
                originals, copies = self._alike.setdefault((data.device, data.dtype), ([], []))
                originals.append(data)
                copies.append(torch.empty_like(data))
            else:
                self._others.append((data, data.clone()))
        for originals, copies in self._alike.values():
            torch._foreach_copy_(copies, originals)

    @torch.no_grad()
    def restore(self) -> None:
        for originals, copies in self._alike.values():
            torch._foreach_copy_(originals, copies)
        for data, copy in self._others:
            data.copy_(copy)
        for buffer, data in zip(self._buffers, self._data, strict=True):
            if data.layout is torch.strided and _place(buffer) != _place(data):
                buffer.data = data


def _is_plain(tensor: Tensor) -> bool:
    """Whether it can be copied together with others of its device and type; many a kind cannot."""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and (tensor.is_cpu or tensor.is_cuda)
    return plain and tensor.dtype in _TOGETHER and not tensor.is_neg()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's elements lie, and how."""
    if tensor.layout is not torch.strided:
        return (tensor.layout,)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def is_expanded(buffer: Tensor) -> bool:
    """Whether several of its elements are one in memory."""
    if buffer.layout is not torch.strided or buffer.is_contiguous():
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


def _restore_registered(registered: Mapping[nn.Module, dict[str, Tensor | None]]) -> None:
    """The buffers that each module had, where the model put others into their places, added or removed some."""
    for module, before in registered.items():
        now = module._buffers
        if not before and not len(now):
            continue
        if isinstance(module, torch.jit.ScriptModule):  # can neither gain nor lose any
            for name in [name for name, buffer in before.items() if now[name] is not buffer]:
                now[name] = before[name]
        # a compiled model checks a dict that was written to once more
        elif list(now) != list(before) or any(now[name] is not buffer for name, buffer in before.items()):
            now.clear()
            now.update(before)


def _restore_computed(computed: Mapping[nn.Module, dict[str, Tensor]]) -> None:
    """The tensors that were plain attributes: those of the attack's passes have no graph."""
    for module, before in computed.items():
        for name, value in before.items():
            if vars(module).get(name) is not value:
                setattr(module, name, value)


def _set_training(flags: Mapping[nn.Module, bool]) -> None:
    for module, flag in flags.items():
        if module.training != flag:
            # nn.Module's own does the same in the end, but asks first whether it is a parameter, a module or a buffer
            own = type(module).__setattr__ is nn.Module.__setattr__
            (object.__setattr__ if own else setattr)(module, "training", flag)


def _require_grad(parameter: Tensor, flag: bool) -> None:
    if parameter.requires_grad != flag:
        parameter.requires_grad_(flag)


def _restore_required(required: Iterable[tuple[nn.Module, str, Tensor, bool]]) -> None:
    """The flags of the parameters, and of those that the model put into their places, as offloading does."""
    for *_, parameter, flag in required:
        _require_grad(parameter, flag)
    restored = {id(parameter) for *_, parameter, _ in required}
    for module, name, _, flag in required:
        if name not in module._parameters:
            continue
        now: object = module._parameters[name]
        if id(now) in restored or not isinstance(now, Tensor) or not now.is_leaf or now.is_inference():
            continue
        if now.is_floating_point() or now.is_complex():
            _require_grad(now, flag)


def uses_batch(module: nn.Module) -> bool:
    """Whether it is a norm layer (batch, instance, SyncBatchNorm, timm's) with running statistics, in train mode.

    They are buffers in each of these; attributes of another kind are a module's own, whatever it does with them.
    """
    if not getattr(module, "training", False) or not getattr(module, "track_running_stats", False):
        return False
    return "running_mean" in module._buffers and "running_var" in module._buffers
