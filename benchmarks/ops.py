"""Operations against eager PyTorch and torch.compile: `python -m benchmarks.ops [--cases ...] [--write]`.

Every provider of an operation is checked against eager before it is timed, and all are timed in the same rounds.
`floor` moves the fewest bytes the operation must move, in memory allocated as the native core allocates it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as TF
from torch import Tensor

from segadv import functional as F

from .cases import CASES, Case
from .measure import advise_huge_pages, check_close, milliseconds_of
from .records import PEAK_MEMORY, Record, Where, require_native_core, write_records

Providers = dict[str, Callable[[], object]]
CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results" / "cpu.csv"


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    return logits if logits.shape[-2:] == size else TF.interpolate(logits, tuple(size), mode="bilinear")


def usual_gain_sum(logits: Tensor, labels: Tensor, *, by_max: bool = False) -> Tensor:
    """Sum of margins [N] as one writes it in eager PyTorch: upsample, gather, scatter -inf, amax.

    by_max: max instead of amax, whose backward, which divides the gradient among ties, is slower.
    """
    logits = upsampled(logits, labels.shape[-2:])
    valid = labels != 255
    y = labels.where(valid, 0).unsqueeze(1)
    others = logits.scatter(1, y, float("-inf"))
    best = others.max(1, keepdim=True).values if by_max else others.amax(1, keepdim=True)
    return ((logits.gather(1, y) - best).squeeze(1) * valid).sum((1, 2))


def usual_averaged_gain(logits: Tensor, labels: Tensor, *, by_max: bool = False) -> Tensor:
    return usual_gain_sum(logits, labels, by_max=by_max) / (labels != 255).sum((1, 2)).clamp(min=1)


def usual_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return TF.cross_entropy(upsampled(logits, labels.shape[-2:]), labels, ignore_index=255)


def predicted(logits: Tensor) -> Tensor:
    """argmax(1); on a CPU max takes half of its time."""
    return logits.argmax(1) if logits.is_cuda else logits.max(1).indices


def usual_loss_sum(logits: Tensor, labels: Tensor, *, loss: str, lam: float = 0.25) -> Tensor:
    """Sum [N] over the valid pixels of cross-entropy, or of SegPGD's or CosPGD's weighted form of it."""
    z = upsampled(logits, labels.shape[-2:])
    entropy = TF.cross_entropy(z, labels, ignore_index=255, reduction="none")
    if loss == "segpgd":
        entropy = entropy * torch.where(predicted(z) == labels, 1 - lam, lam)
    elif loss == "cospgd":
        p = z.detach().softmax(1)
        y = labels.where(labels != 255, 0).unsqueeze(1)
        entropy = entropy * (p.gather(1, y).squeeze(1) / p.norm(dim=1))
    return entropy.sum((1, 2))


def usual_confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Ignored pixels get a cell of their own, which takes less time than to leave them out."""
    classes = logits.shape[1]
    prediction = predicted(upsampled(logits, labels.shape[-2:]))
    cells = torch.where(labels == 255, classes**2, labels * classes + prediction)
    return torch.bincount(cells.flatten(), minlength=classes**2 + 1)[:-1].view(classes, classes)


def usual_newton_step(images: Tensor, grad: Tensor, gain: Tensor) -> Tensor:
    eps = gain / grad.abs().flatten(1).sum(1)
    return (images - eps.view(-1, 1, 1, 1) * grad.sign()).clamp(0, 1)


def usual_sign_step(images: Tensor, grad: Tensor, origin: Tensor) -> Tensor:
    x = images + 0.01 * grad.sign()
    return torch.minimum(torch.maximum(x, origin - 0.03), origin + 0.03).clamp(0, 1)


def segadv_sign_step(images: Tensor, grad: Tensor, origin: Tensor) -> Tensor:
    return F.sign_step(images, grad, 0.01, origin=origin, eps=0.03)


def segadv_newton_step(images: Tensor, grad: Tensor, gain: Tensor) -> Tensor:
    return F.newton_step(images, grad, gain)[0]


# operation -> (ours, the usual code, modes)
OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[str, ...]]] = {
    "averaged_gain": (F.averaged_gain, usual_averaged_gain, ("forward + backward", "forward")),
    "cross_entropy": (F.cross_entropy, usual_cross_entropy, ("forward + backward", "forward")),
    "confusion_matrix": (F.confusion_matrix, usual_confusion_matrix, ("forward",)),
    "newton_step": (segadv_newton_step, usual_newton_step, ("forward",)),
    "sign_step": (segadv_sign_step, usual_sign_step, ("forward",)),
}
PIXEL_SPACE = ("newton_step", "sign_step")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ONE_PASS = {"averaged_gain": F.gain_and_grad, "cross_entropy": F.loss_and_grad}


def value_and_gradient(function: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    value = function(logits, labels).sum()
    (grad,) = torch.autograd.grad(value, logits)
    return value.detach(), grad


def arguments_of(
    operation: str, case: Case, *, full_resolution: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    if operation not in PIXEL_SPACE:
        return case.tensors(full_resolution=full_resolution, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(case.images, 3, case.size, case.size, generator=generator)
    grad = torch.randn(images.shape, generator=generator)
    return images, grad, torch.ones(case.images) if operation == "newton_step" else images.clone()


def providers_of(
    operation: str,
    mode: str,
    case: Case,
    *,
    full_resolution: bool,
    compiled: bool,
    dtype: torch.dtype = torch.float32,
) -> Providers:
    """Provider name -> call. All but the floor return the same numbers."""
    ours, usual, _ = OPERATIONS[operation]
    arguments = arguments_of(operation, case, full_resolution=full_resolution, dtype=dtype)
    functions: dict[str, Callable[..., Tensor]] = {"segadv": ours, "eager": usual}
    if operation == "averaged_gain":
        functions["eager, max"] = partial(usual_averaged_gain, by_max=True)
    if compiled:
        torch._dynamo.reset()  # otherwise the limit of recompilations would silently make it eager
        for name in ("eager", "eager, max"):
            if name in functions:
                functions[name.replace("eager", "compile")] = torch.compile(functions[name], dynamic=False)
    first = arguments[0]
    if mode == "forward":
        providers: Providers = {name: partial(function, *arguments) for name, function in functions.items()}
    else:
        leaf = first.clone().requires_grad_()
        providers = {
            name: partial(value_and_gradient, function, leaf, *arguments[1:]) for name, function in functions.items()
        }
        providers["segadv one pass"] = partial(ONE_PASS[operation], *arguments)
    if operation == "newton_step":  # reads two, writes one; the second reading of the gradient is the cache's
        providers["floor"] = lambda: torch.add(first, arguments[1], out=advise_huge_pages(torch.empty_like(first)))
    elif operation == "sign_step":  # reads three, writes one
        providers["floor"] = lambda: torch.addcmul(*arguments, out=advise_huge_pages(torch.empty_like(first)))
    elif full_resolution and mode != "forward":
        providers["floor"] = lambda: advise_huge_pages(torch.empty_like(first)).copy_(first)
    return providers


def in_float32(operation: str, mode: str, case: Case, dtype: torch.dtype, *, full_resolution: bool) -> object:
    """What eager makes in float32 of logits that have been rounded to dtype, and may tie by that."""
    logits, labels = arguments_of(operation, case, full_resolution=full_resolution, dtype=dtype)
    # amax would divide the gradient among classes that tie
    usual = partial(usual_averaged_gain, by_max=True) if operation == "averaged_gain" else OPERATIONS[operation][1]
    if mode == "forward":
        return usual(logits.float(), labels)
    return value_and_gradient(usual, logits.float().requires_grad_(), labels)


def check(operation: str, providers: Providers, truth: object = None) -> None:
    """Every provider but the floor has eager's numbers, up to rounding.

    truth: `in_float32`, where the logits are of half precision; eager's own rounding of all that lies between is not
    ours to judge then.
    """
    expected = _tensors(providers["eager"]() if truth is None else truth)
    allowed = 2e-3 if truth is None else 5e-2
    for name in providers.keys() - {"eager", "floor"}:
        if truth is not None and not name.startswith("segadv"):
            continue
        results = _tensors(providers[name]())
        if name == "segadv one pass":
            results = _of_means(operation, *results)
        for ours, theirs in zip(results, expected, strict=True):
            check_close(f"{name} against eager", ours, theirs, tolerance=allowed)


def _tensors(result: object) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)  # type: ignore[return-value]


def _of_means(operation: str, total: Tensor, n_valid: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of images and their gradient, as value and gradient of what `value_and_gradient` differentiates."""
    pixels = n_valid if operation == "averaged_gain" else n_valid.sum().expand_as(n_valid)  # else of the batch
    return (total / pixels).sum(), grad / pixels.view(-1, 1, 1, 1)


def measured(where: Where, operation: str, mode: str, calls: Providers, *, rounds: int) -> list[Record]:
    """Time and peak memory of every provider."""
    for call in (*calls.values(), *calls.values()):
        call()
    times = milliseconds_of(calls, CPU, rounds=rounds)
    return [
        record
        for provider, call in calls.items()
        for record in where.time_and_memory(operation, provider, mode, times[provider], call)
    ]


def table(title: str, records: Sequence[Record]) -> str:
    memory = {record.provider: record.p50 for record in records if record.operation.endswith(PEAK_MEMORY)}
    times = {record.provider: record for record in records if not record.operation.endswith(PEAK_MEMORY)}
    ms = {provider: record.p50 for provider, record in times.items()}
    lines = [
        f"  {provider:16s} {record.p50:9.2f} ms  [{record.p20:.2f}, {record.p80:.2f}]   "
        f"peak {memory[provider]:8.1f} MB   {record.p50 / ms['segadv']:6.1f} x segadv"
        for provider, record in times.items()
    ]
    best = min(time for provider, time in ms.items() if provider.startswith(("eager", "compile")))
    fastest = min(ms["segadv"], ms.get("segadv one pass", math.inf))
    line = f"  segadv is {best / ms['segadv']:.1f} times faster than the better of eager and compile"
    if "segadv one pass" in ms:
        line += f" ({best / fastest:.1f} in one pass)"
    if "floor" in ms:
        line += f"; {ms['segadv'] / ms['floor']:.2f} x the floor ({fastest / ms['floor']:.2f} at best)"
    return "\n".join(["", title, *lines, line])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["cityscapes19"])
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--resolution", nargs="+", choices=["upsampled", "full"], default=["upsampled", "full"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="of the logits")
    parser.add_argument("--channels-last", action="store_true", help="logits in channels_last instead of NCHW")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--write", metavar="CSV", nargs="?", const=str(RESULTS))
    options = parser.parse_args(arguments)
    require_native_core(CPU)
    thp = os.environ.get("THP_MEM_ALLOC_ENABLE", "0")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, THP_MEM_ALLOC_ENABLE={thp}")
    for case_name, dtype_name in product(options.cases, options.dtypes):
        case, dtype = CASES[case_name], DTYPES[dtype_name]
        if options.channels_last:
            case = replace(case, name=f"{case_name}, channels_last", channels_last=True)
        usual_case = not (case.noise or options.channels_last or dtype is not torch.float32)
        for operation in options.operations:
            if operation in PIXEL_SPACE and not usual_case:  # whose arguments are the same in every case
                continue
            resolutions = ["full"] if operation in PIXEL_SPACE else options.resolution
            for full, mode in product((r == "full" for r in resolutions), OPERATIONS[operation][2]):
                build = partial(providers_of, operation, mode, case, full_resolution=full)
                providers = build(compiled=not options.no_compile, dtype=dtype)
                truth = (
                    None if dtype is torch.float32 else in_float32(operation, mode, case, dtype, full_resolution=full)
                )
                check(operation, providers, truth)
                own, channels = case.size if full else case.own, 3 if operation in PIXEL_SPACE else case.classes
                name = operation if full else f"upsample + {operation}"
                shape = f"{case.images} x {channels} x {own} x {own} -> {case.size}"
                where = Where(case.name, dtype, CPU)
                records = measured(where, name, mode, providers, rounds=options.rounds)
                print(table(f"{case.name}: {name}, {mode}, {shape}, {dtype_name}", records), flush=True)
                if options.write:
                    write_records(Path(options.write), records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
