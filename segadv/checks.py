"""Checks of arguments, with the same message everywhere: the argument, what it must be, and what it got."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Collection, Iterable
from numbers import Integral, Rational, Real
from types import FrameType
from typing import TypeGuard

import torch
from torch import Tensor, nn

__all__ = [
    "LABEL_TYPES",
    "a_module",
    "a_tensor",
    "at_least",
    "checked_bounds",
    "described",
    "did_you_mean",
    "dtype_names",
    "image_type",
    "in_range",
    "is_number",
    "label_type",
    "levels_to_the_caller",
    "names_out_of",
    "number_or_vector",
    "one_of",
    "true_or_false",
    "whole_number",
]

LABEL_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)

_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}

_OVERSHOOT = 0.1  # of the range: what resampling with a cubic kernel may add


def a_module(model: object) -> None:
    """TypeError where it is no nn.Module."""
    if isinstance(model, type):
        raise TypeError(f"model must be an nn.Module, got the class {model.__name__}; give an instance of it")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, got a {type(model).__name__}; for a function write a module whose forward "
            "calls it"
        )


def dtype_names(*dtypes: torch.dtype) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def a_tensor(name: str, value: object) -> None:
    """TypeError where it is no tensor, ValueError where it is not dense."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got a {type(value).__name__}")
    if value.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got a nested one")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got one of layout {value.layout}; {name}.to_dense() converts")


def image_type(images: Tensor) -> None:
    """ValueError where they are no batch of float32 or float64."""
    if images.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"images must be float32 or float64, got {described(images)}; keep images in float32 and use autocast "
            "(half precision is too coarse for an eps-ball)"
        )
    if images.dtype not in (torch.float32, torch.float64) or images.dim() < 1:
        bytes_ = "; images.float() / 255 converts bytes" if images.dtype is torch.uint8 else ""
        raise ValueError(f"images must be float32 or float64 [N, ...], got {described(images)}{bytes_}")


def label_type(labels: Tensor) -> None:
    """ValueError where it is none of `LABEL_TYPES`."""
    if labels.dtype not in LABEL_TYPES:
        scores = labels.is_floating_point() and labels.dim() == 4
        remedy = "labels.argmax(1) makes classes of scores" if scores else "labels.long() converts"
        raise ValueError(
            f"labels must have one of the dtypes {dtype_names(*LABEL_TYPES)}, got {dtype_names(labels.dtype)}; {remedy}"
        )


def number_or_vector(name: str, value: float | Tensor, images: Tensor) -> tuple[float, Tensor | None]:
    """(number, None), or (0.0, tensor [N]) where the value is given per image; an error where it fits no images."""
    if not isinstance(value, Tensor):
        if not is_number(value):
            raise TypeError(f"{name} must be a number, or a tensor [N], got a {type(value).__name__}")
        limit = _LARGEST[images.dtype]
        # A whole number may be too large for a float; a number of NumPy's would have the limit rounded to its own type.
        if not -limit <= (value if type(value) is float or isinstance(value, Rational) else float(value)) <= limit:
            raise ValueError(f"{name} must be finite in {dtype_names(images.dtype)}, got {value}")
        return float(value), None
    a_tensor(name, value)
    if value.shape != images.shape[:1] or not value.is_floating_point() or value.device != images.device:
        raise ValueError(
            f"{name} must be a number or a floating point [{images.shape[0]}] on {images.device}, "
            f"got {described(value)}"
        )
    return 0.0, value.detach().to(images.dtype).contiguous()


def checked_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """The range of the images as floats; ValueError where it is none."""
    try:
        low, high = bounds
        if is_number(low) and is_number(high):
            low, high = float(low), float(high)
            if low < high:
                return low, high
    except (TypeError, ValueError, OverflowError):  # not two, or too large
        pass
    raise ValueError(
        f"bounds must be two numbers, (low, high) with low < high, got {bounds!r}. For images that were normalised, "
        "move mean and std into the model: segadv.models.wrap(model, mean=..., std=...)"
    )


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, or what stands for one in a trace; True and False are none here."""
    if type(value) is float or type(value) is int:  # at once; to ask Real takes 0.4 us
        return True
    return isinstance(value, (Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def true_or_false(**arguments: object) -> None:
    """TypeError where an argument is neither: the word "False" would be taken for True."""
    if torch.compiler.is_compiling():  # where it may be a symbol
        return
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def whole_number(**arguments: object) -> None:
    """TypeError where an argument is no whole number, ValueError where 64 bits do not hold it."""
    if torch.compiler.is_compiling():  # where it may be a symbol
        return
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got a {type(value).__name__}")
        if not -(2**63) <= int(value) < 2**63:
            raise ValueError(f"{name} must be a whole number of 64 bits, got {value}")


def at_least(minimum: int, **arguments: int) -> None:
    """TypeError where an argument is no whole number, ValueError where it is less than the minimum."""
    for name, value in arguments.items():
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_whole or int(value) < minimum:
            error = ValueError if is_whole else TypeError
            raise error(f"{name} must be a whole number of at least {minimum}, got {value!r}")


def one_of(known: Collection[str], **arguments: str) -> None:
    """ValueError where an argument is not a known name; it tells which one may be meant."""
    for name, value in arguments.items():
        if not isinstance(value, str) or value not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(known)}; got {value!r}{did_you_mean(str(value), known)}"
            )


def names_out_of(known: Collection[str], **arguments: Iterable[str]) -> None:
    """ValueError where one of an argument's entries is not a known name."""
    for name, values in arguments.items():
        if unknown := [value for value in values if value not in known]:
            meant = did_you_mean(str(unknown[0]), known)
            raise ValueError(f"{name} must be names out of {', '.join(known)}; got {unknown}{meant}")


def in_range(images: Tensor, name: str, bounds: tuple[float, float] = (0.0, 1.0), *, slack: float = _OVERSHOOT) -> None:
    """ValueError where pixels are outside of the range to which attacks clip; `name` is what gave them.

    Args:
        slack: by what part of the range they may be.
    """
    if not images.numel():
        return
    low, high = (value.item() for value in images.aminmax())
    slack *= bounds[1] - bounds[0]
    if math.isnan(low):
        place = images.isnan().nonzero()[0].tolist()
        raise ValueError(f"{name}: a pixel is NaN, the first one at {place}; pixels must be numbers")
    if not (low >= bounds[0] - slack and high <= bounds[1] + slack):
        raise ValueError(
            f"{name}: pixels must be in [{bounds[0]:g}, {bounds[1]:g}], found {low:.7g} to {high:.7g}. Divide bytes by "
            "255; put mean and standard deviation into the model: segadv.models.wrap(model, mean=..., std=...); where "
            f"resampling overshot: images.clamp({bounds[0]:g}, {bounds[1]:g})"
        )


def did_you_mean(name: str, names: Collection[str]) -> str:
    """ ", did you mean 'x'?" with the one of `names` that looks like `name`, whatever its case; else nothing."""
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f", did you mean {by_lower[near[0]]!r}?" if near else ""


def levels_to_the_caller() -> int:
    """stacklevel= of a warning that should name the line which called this package."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("segadv", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level
