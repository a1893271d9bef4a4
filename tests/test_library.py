"""Registration, backends, errors: what holds for the operations as a whole."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import segadv
from segadv import functional as F
from segadv.ops import autograd, backends, common, library, native

SIZES = {"full": (6, 8), "up": (3, 4)}


def sample_inputs(own: tuple[int, int], dtype: torch.dtype, channels_last: bool) -> dict[str, tuple[Any, ...]]:
    """Arguments for every registered operation."""
    z = torch.randn(2, 5, *own).to(dtype)
    if channels_last:
        z = z.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 5, (2, 6, 8))
    y[0, 0] = 255
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    images, grad = torch.rand(2, 3, 6, 8, dtype=wide), torch.randn(2, 3, 6, 8, dtype=wide)
    if channels_last:
        images, grad = (t.contiguous(memory_format=torch.channels_last) for t in (images, grad))
    runner_up = torch.zeros(2, 6, 8, dtype=torch.uint8)
    per_pixel, weight = torch.rand(2, 6, 8, dtype=wide), torch.rand(2, 5, dtype=wide)
    return {
        "pixel_margin": (z, y, 255, False),
        "averaged_gain": (z, y, 255, True),
        "gain_and_grad": (z, y, 255, False),
        "margin_backward": (per_pixel, y, runner_up, list(z.shape), channels_last, dtype, 255, False),
        "cross_entropy": (z, y, weight, "cross_entropy", 0.0, False, 255, False, True, True),
        "cross_entropy_backward": (per_pixel, z, y, per_pixel, per_pixel, weight, per_pixel, 255, False),
        "loss_and_grad": (z, y, weight, "segpgd", 0.25, False, 255, True),
        "l1_norm": (grad.to(dtype),),
        "newton_step": (images, grad, torch.rand(2), 0.0, 1.0, False, None),
        "sign_step": (images, grad, 0.1, None, images.clone(), 0.1, None, 0.0, 1.0),
        "scale_gradient": (z, torch.rand(2, dtype=wide)),
        "confusion_matrix": (z, y, 255, False, True),
        "argmax_labels": (z, [6, 8], False),
    }


OPERATIONS = tuple(sample_inputs((3, 4), torch.float32, False))


def test_every_registered_operation_is_tested_and_has_every_backend() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("segadv::")}
    assert registered == set(OPERATIONS)
    for name, module in backends.BACKENDS.items():
        missing = [operation for operation in OPERATIONS if not hasattr(module, operation)]
        assert not missing, f"{name} lacks {missing}"


@pytest.mark.parametrize("own", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(backend: str, operation: str, own: tuple[int, int]) -> None:
    native = [(dtype, layout) for dtype in (torch.float32, torch.bfloat16, torch.float64) for layout in (False, True)]
    # What an operation registers is the same for all backends; the reference leaves layouts to PyTorch.
    for dtype, channels_last in native[: {"native": 6, "reference": 2}.get(backend, 1)]:
        arguments = sample_inputs(own, dtype, channels_last)[operation]
        torch.library.opcheck(getattr(library, operation), arguments)
        if operation == "cross_entropy":  # and with weights of the pixels, which are kept for a backward alone
            weighs = (*arguments[:2], None, "segpgd", 0.25, False, 255, False, False, True)
            torch.library.opcheck(getattr(library, operation), weighs)
            for given in ((*weighs[:-1], False), (*weighs[:3], "cospgd", *weighs[4:])):
                torch.library.opcheck(getattr(library, operation), given, test_utils="test_faketensor")
        transposed = [
            value.transpose(1, 2).contiguous().transpose(1, 2)
            if isinstance(value, Tensor) and value.dim() == 3
            else value
            for value in arguments
        ]
        if backend in ("native", "reference") and dtype is torch.float32:
            torch.library.opcheck(getattr(library, operation), tuple(transposed))
        if operation == "cross_entropy":  # for_backward=False
            without = (*arguments[:-1], False)
            torch.library.opcheck(getattr(library, operation), without)
            result, expected = (getattr(library, operation)(*given) for given in (without, arguments))
            assert torch.equal(result[0], expected[0])
            assert torch.equal(result[1], expected[1])
            assert all(entry.numel() == 0 for entry in result[3:])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fake_kernels_of_other_layouts_and_options(operation: str) -> None:
    """Images and logits in an order that is neither contiguous nor channels_last; flags the other way; 300 classes."""
    for turned, classes in ((True, 5), (False, 300)):
        arguments = list(sample_inputs((3, 4), torch.float32, False)[operation])
        if operation in ("cross_entropy", "confusion_matrix"):
            arguments[-1 if operation == "confusion_matrix" else -2] = False
        for i, value in enumerate(arguments):
            if isinstance(value, Tensor) and value.dim() == 4 and turned:
                arguments[i] = value.transpose(2, 3).contiguous().transpose(2, 3)
            if isinstance(value, Tensor) and not turned and value.shape[-3:] == (5, 3, 4):
                arguments[i] = torch.randn(2, classes, 3, 4)
            if isinstance(value, Tensor) and not turned and value.shape == (2, 5):
                arguments[i] = torch.rand(2, classes)
        torch.library.opcheck(getattr(library, operation), tuple(arguments), test_utils="test_faketensor")


def test_one_graph_for_all_sizes() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(module: Any, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(
        lambda z, y: (F.pixel_margin(z, y).sum(), F.argmax_labels(z, tuple(y.shape[1:]))),
        fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=backend),
    )  # fmt: skip
    for own, size in (((3, 4), (6, 8)), ((5, 7), (14, 15)), ((4, 3), (12, 7))):
        z, y = torch.randn(2, 5, *own, requires_grad=True), torch.randint(0, 5, (2, *size))
        gain, labels = compiled(z, y)
        expected = F.pixel_margin(z, y).sum()
        torch.testing.assert_close(torch.autograd.grad(gain, z), torch.autograd.grad(expected, z))
        assert torch.equal(labels, F.argmax_labels(z, size))
    assert len(graphs) == 2  # forward and backward, once


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pixel_margin": lambda z, y: F.pixel_margin(z, y).sum(),
    "averaged_gain": lambda z, y: F.averaged_gain(z, y).sum(),
    "cross_entropy": lambda z, y: F.cross_entropy(z, y),
    "segpgd_loss": lambda z, y: F.segpgd_loss(z, y, 1, 4).sum(),
    "cospgd_loss": lambda z, y: F.cospgd_loss(z, y).sum(),
}


@pytest.mark.parametrize("own", SIZES.values(), ids=SIZES)
def test_compile_fullgraph(backend: str, own: tuple[int, int]) -> None:
    def everything(z: Tensor, y: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        value = torch.stack([function(z * 1.5, y) for function in FUNCTIONS.values()]).sum()
        gain_sum, n_valid, grad = F.gain_and_grad(z, y)
        loss_sum, _, _ = F.loss_and_grad(z, y)
        adversarial, eps = F.newton_step(images, images - 0.5, gain_sum)
        stepped = F.sign_step(adversarial, images - 0.5, 0.1, origin=images, eps=0.05)
        matrix = F.confusion_matrix(z, y)
        return (
            value,
            n_valid,
            grad,
            loss_sum,
            eps,
            stepped,
            F.l1_norm(images),
            matrix,
            F.argmax_labels(z, (6, 8)),
        )

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    z, y, images = torch.randn(2, 5, *own), torch.randint(0, 5, (2, 6, 8)), torch.rand(2, 3, 6, 8)
    grads = []
    results = []
    for function in (everything, compiled):
        leaf = z.clone().requires_grad_()
        result = function(leaf, y, images)
        grads.append(torch.autograd.grad(result[0], leaf)[0])
        results.append(result)
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile_fullgraph_in_a_fresh_process(name: str) -> None:
    """Nothing that an earlier eager call leaves behind (a thread-local, say) may be needed."""
    code = (
        "import torch\nfrom test_library import FUNCTIONS\n"
        f"function = FUNCTIONS[{name!r}]\n"
        "y = torch.randint(0, 5, (2, 6, 8))\n"
        "for own in ((6, 8), (3, 4)):\n"
        "    z = torch.randn(2, 5, *own, requires_grad=True)\n"
        "    value = torch.compile(function, fullgraph=True, backend='aot_eager')(z, y)\n"
        "    (grad,) = torch.autograd.grad(value, z)\n"
        "    (expected,) = torch.autograd.grad(function(z, y), z)\n"
        "    torch.testing.assert_close(grad, expected)\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr


def test_labels_and_class_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        y, weight = torch.randint(0, 5, (2, 6, 8)), torch.rand(5)
    for own in SIZES.values():
        z = torch.randn(2, 5, *own, requires_grad=True)
        for function in FUNCTIONS.values():
            assert torch.autograd.grad(function(z, y), z)[0].isfinite().all()
        losses = [F.cross_entropy(z, labels, weight=of) for labels, of in ((y, weight), (y.clone(), weight.clone()))]
        assert torch.equal(*(torch.autograd.grad(loss, z)[0] for loss in losses))


def test_inductor_fullgraph() -> None:
    torch._dynamo.reset()
    z, y = torch.randn(2, 5, 3, 4, requires_grad=True), torch.randint(0, 5, (2, 6, 8))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.relu() * 2, y) + F.averaged_gain(z, y).sum()

    with torch._dynamo.config.patch(only_allow_pt2_compliant_ops=True):
        expected, got = loss(z, y), torch.compile(loss, fullgraph=True)(z, y)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(expected, z))


@pytest.mark.parametrize("size", [(3, 4), (6, 8)], ids=["resampled", "full resolution"])
def test_inductor_with_weights_of_classes(size: tuple[int, int]) -> None:
    torch._dynamo.reset()
    z, y = torch.randn(3, 5, *size, requires_grad=True), torch.randint(0, 5, (3, 6, 8))
    weight = torch.rand(5, dtype=torch.bfloat16) + 0.5

    def losses(z: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        balanced = F.loss_and_grad(z.detach(), y, loss="cospgd", balanced=True)
        scaled = weight.float() / weight.float().sum()
        return F.cross_entropy(z, y, weight=weight) + F.cross_entropy(z, y, weight=scaled), *balanced

    expected, got = (
        (*found, *torch.autograd.grad(found[0], z))
        for found in (losses(z, y, weight), torch.compile(losses, fullgraph=True)(z, y, weight))
    )
    torch.testing.assert_close(got, expected)


def test_export_with_any_number_of_images() -> None:
    class Everything(torch.nn.Module):
        def forward(self, z: Tensor, y: Tensor, images: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            gain, *_ = F.gain_and_grad(z, y)
            return (
                *F.loss_and_grad(z, y, loss="cospgd", balanced=True),
                *F.newton_step(images, grad, gain),
                F.sign_step(images, grad, 0.1, origin=images, eps=0.2),
                *(function(z, y) for function in (F.pixel_margin, F.averaged_gain, F.cospgd_loss, F.confusion_matrix)),
                *(F.cross_entropy(z, y, weight=weight, reduction=how) for how in ("mean", "image")),
                F.segpgd_loss(z, y, 1, 3), F.argmax_labels(z, (6, 8)), F.l1_norm(grad),
            )  # fmt: skip

    def arguments(images: int) -> tuple[Tensor, ...]:
        z, y = torch.randn(images, 5, 3, 4), torch.randint(0, 5, (images, 6, 8))
        return z, y, torch.rand(images, 3, 6, 8), torch.randn(images, 3, 6, 8), torch.rand(5) + 0.5

    sizes = ({0: torch.export.Dim("images", min=2)},) * 4
    exported = torch.export.export(Everything(), arguments(3), dynamic_shapes=(*sizes, None))
    for given in (arguments(3), arguments(4)):
        torch.testing.assert_close(exported.module()(*given), Everything()(*given))


def test_weights_of_classes_of_any_layout(backend: str) -> None:
    z, y, of_images = torch.randn(3, 5, 3, 4), torch.randint(0, 5, (3, 6, 8)), torch.rand(3, 5) + 0.5

    def found(weight: Tensor) -> tuple[Tensor, ...]:
        plain = ("cross_entropy", 0.0, False, 255, False)
        losses, _, _, shift, scale, _ = library.cross_entropy(z, y, weight, *plain, False, True)
        one = torch.ones(()).expand(y.shape)
        grad = library.cross_entropy_backward(one, z, y, shift, scale, weight, None, 255, False)
        return losses, grad, *library.loss_and_grad(z, y, weight, "segpgd", 0.25, False, 255, False)

    # Weights of classes and of pixels together count once in the backward too.
    z.requires_grad_()
    loss, _, _ = autograd.CrossEntropy.apply(z, y, of_images, "segpgd", 0.25, False, 255, False, False)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    z = z.detach()
    torch.testing.assert_close(grad, found(of_images)[-1])
    across = torch.empty_strided((3, 5), (1, 3)).copy_(of_images)
    assert all(map(torch.equal, found(across), found(of_images)))
    of_all = of_images[0].expand(3, 5)
    same = torch.empty_strided((3, 5), (1, 3)).copy_(of_all)
    for weight in (of_images[0], of_all, same):
        assert all(map(torch.equal, found(weight), found(of_all.contiguous())))
    for wrong in (of_images[:, :4], of_images[:1], of_images.double(), of_images[0, :4]):
        with pytest.raises(ValueError, match=r"class_weight must be \[5\] or \[3, 5\] of torch.float32, got \["):
            found(wrong)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_raise(backend: str, name: str) -> None:
    z, y = torch.randn(2, 5, 3, 4, requires_grad=True), torch.randint(0, 5, (2, 6, 8))
    value = FUNCTIONS[name](z, y)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        torch.autograd.grad(value, z, create_graph=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func_is_refused(name: str) -> None:
    z, y = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 6, 8))
    for transformed in (
        lambda: torch.func.grad(lambda z: FUNCTIONS[name](z, y))(z),
        lambda: torch.func.vmap(lambda y: FUNCTIONS[name](z, y))(y[None]),
        lambda: torch.func.jvp(lambda z: FUNCTIONS[name](z, y), (z,), (z,)),
    ):
        with pytest.raises(
            RuntimeError, match=r"tensors must be outside of a torch\.func transform .*, got them inside"
        ):
            transformed()
    with pytest.raises(RuntimeError, match="tensors must be outside"):
        torch.func.grad(lambda z: F.l1_norm(z).sum())(z)


@pytest.mark.parametrize("name", ["alpha", "eps", "max_eps", "high"])
def test_numbers_may_change_in_a_full_graph(name: str) -> None:
    """From the second value on Dynamo takes a number for a symbol."""
    images, grad, gain = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(2)
    step = {
        "alpha": lambda value: F.sign_step(images, grad, value),
        "eps": lambda value: F.sign_step(images, grad, 0.1, origin=images, eps=value),
        "max_eps": lambda value: F.newton_step(images, grad, gain, max_eps=value)[0],
        "high": lambda value: F.newton_step(images, grad, gain, bounds=(0.0, value))[0],
    }[name]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for value in (0.01, 0.02, 0.03):
        assert torch.equal(compiled(value), step(value))
    with pytest.raises((ValueError, RuntimeError)):  # compiled code checks it as well
        compiled(torch.nan)


def test_numbers_of_numpy_and_of_traces() -> None:
    images, grad = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.float64):
            x, g = images.to(dtype), grad.to(dtype)
            expected = F.sign_step(x, g, 0.5, bounds=(0, 2))
            for half in (np.float16(0.5), np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
                assert torch.equal(F.sign_step(x, g, half, bounds=np.array([0.0, 2.0])), expected)
    traced = make_fx(lambda x, g: F.sign_step(x, g, 1 / x.shape[2], bounds=(0, x.shape[0])), tracing_mode="symbolic")
    assert torch.equal(traced(images, grad)(images, grad), F.sign_step(images, grad, 0.25, bounds=(0, 2)))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_torch_func_is_refused_when_compiled(fullgraph: bool) -> None:
    """Dynamo takes the gradient with respect to a function's own input for 0, without a word (torch 2.13)."""
    z, y = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 6, 8))
    for transformed in (
        torch.func.grad(lambda z: F.cross_entropy(z, y)),
        torch.func.grad(lambda z: F.l1_norm(z).sum()),
        torch.func.vmap(torch.func.grad(lambda z: F.averaged_gain(z[None], y[:1]).sum())),
        lambda z: torch.func.jvp(lambda z: F.pixel_margin(z, y), (z,), (z,))[1],
    ):
        torch._dynamo.reset()
        compiled = torch.compile(transformed, backend="eager", fullgraph=fullgraph)
        with pytest.raises(RuntimeError, match=r"tensors must be outside of a torch\.func transform"):
            compiled(z)


# --- backends ---------------------------------------------------------------------------------------------------


def test_native_is_what_runs_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = backends.BACKENDS["native"].l1_norm
    monkeypatch.setattr(backends.BACKENDS["native"], "l1_norm", lambda g: called.append(1) or original(g))
    monkeypatch.delenv("SEGADV_BACKEND", raising=False)
    F.l1_norm(torch.rand(2, 3))
    assert called == [1]
    assert segadv.build_info()["native"]


def test_backend_is_per_thread_and_restored() -> None:
    seen = []
    with segadv.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()))
        thread.start()
        thread.join()
        with pytest.raises(ZeroDivisionError), segadv.backend("native"):
            raise ZeroDivisionError
        assert backends.requested() == "reference"
    assert seen == [None]
    assert backends.requested() is None


@pytest.mark.parametrize("size", [2, 8])  # of 8, in one pass
@pytest.mark.parametrize("function", [F.averaged_gain, F.cross_entropy])
def test_backward_uses_the_backend_of_the_forward(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[Tensor, Tensor], Tensor], size: int
) -> None:
    for name in ("margin_backward", "cross_entropy_backward", "scale_gradient"):
        monkeypatch.setattr(backends.BACKENDS["native"], name, lambda *_: pytest.fail("the native backward ran"))
    z, y = torch.randn(1, 3, 2, 2, requires_grad=True), torch.zeros(1, size, size, dtype=torch.long)
    with segadv.backend("reference"):
        value = function(z, y)
    value.sum().backward()
    assert z.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_saved_gradient_may_come_back_in_another_precision(backend: str, dtype: torch.dtype) -> None:
    z, y = torch.randn(2, 3, 2, 2, dtype=dtype, requires_grad=True), torch.randint(0, 3, (2, 8, 8))
    (expected,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    other = torch.float64 if dtype is torch.float32 else torch.float32
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(other), lambda t: t):
        (grad,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("own", [(6, 8), (4, 5)], ids=["full", "up"])  # too many logits for one pass
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("change", ["precision", "gaps"])
@pytest.mark.parametrize("name", ["cross_entropy", "cospgd_loss"])
def test_saved_tensors_that_come_back_in_another_precision_or_with_gaps(
    backend: str, name: str, change: str, dtype: torch.dtype, own: tuple[int, int]
) -> None:
    z, y = torch.randn(2, 3, *own, dtype=dtype, requires_grad=True), torch.randint(0, 3, (2, 6, 8))
    options = {"weight": torch.rand(3, dtype=dtype) + 0.5} if name == "cross_entropy" else {}
    other = torch.float32 if dtype is torch.float64 else torch.float64

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if change == "precision":
            return tensor.to(other)
        return torch.stack([tensor, torch.full_like(tensor, 9)], dim=-1)[..., 0]

    (expected,) = torch.autograd.grad(getattr(F, name)(z, y, **options).sum(), z)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, changed):
        loss = getattr(F, name)(z, y, **options).sum()
    (grad,) = torch.autograd.grad(loss, z)
    assert grad.dtype is dtype
    torch.testing.assert_close(
        grad, expected, rtol=1e-4 if (change, dtype) == ("precision", torch.float64) else 0, atol=1e-7
    )


@pytest.mark.parametrize("own", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ["pixel_margin", "averaged_gain", "cross_entropy", "none", "cospgd_loss"])
def test_saved_tensors_that_come_back_with_other_strides(backend: str, name: str, own: tuple[int, int]) -> None:
    """As hooks that offload or compress them may do."""
    z, y = torch.randn(2, 3, *own, requires_grad=True), torch.randint(0, 3, (2, 6, 8))

    def gradient() -> Tensor:
        if name == "none":
            value = F.cross_entropy(z, y, reduction="none")
        else:
            value = getattr(F, name)(z, y)
        return torch.autograd.grad(value, z, torch.ones_like(value))[0]

    def turned(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() < 3 else tensor.transpose(-1, -2).contiguous()

    expected = gradient()
    with torch.autograd.graph.saved_tensors_hooks(turned, lambda t: t if t.dim() < 3 else t.transpose(-1, -2)):
        assert torch.equal(gradient(), expected)


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match=r"backend must be one of native, triton, reference.*; got 'fast'"),
        segadv.backend("fast"),
    ):
        pass


def test_explicit_request_that_cannot_be_met_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.BACKENDS["native"], "unavailable", lambda _: "it is switched off")
    with segadv.backend("native"), pytest.raises(RuntimeError, match="cannot run: it is switched off"):
        F.l1_norm(torch.rand(1, 2))
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match="reference backend for cpu tensors .native: it is switched off"):
        F.l1_norm(torch.rand(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.l1_norm(torch.rand(1, 2))  # it is told once
    monkeypatch.setenv("SEGADV_BACKEND", "native")
    with pytest.raises(RuntimeError, match="was requested"):
        F.l1_norm(torch.rand(1, 2))
    monkeypatch.setenv("SEGADV_BACKEND", "none-such")
    with pytest.raises(ValueError, match=r"SEGADV_BACKEND must be one of native, triton, .*; got 'none-such'"):
        F.l1_norm(torch.rand(1, 2))
    assert "none-such" in backends.report()


def test_what_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native backend's kernels for it, else Triton's, else the reference; what was asked for or an error."""
    refused = set()

    def that_is_told_of(name: str) -> SimpleNamespace:
        return SimpleNamespace(unavailable=lambda kind: f"{name} is off" if (name, kind) in refused else None)

    known = {name: that_is_told_of(name) for name in ("native", "triton", "reference")}
    monkeypatch.setattr(backends, "BACKENDS", known)
    monkeypatch.setattr(backends, "_warned", {"xpu"})
    monkeypatch.delenv("SEGADV_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.select("cuda") is backends._CUDA
    for name, expected in (known | {"native": backends._CUDA}).items():
        with segadv.backend(name):
            assert backends.select("cuda") is expected
            assert backends.select("cpu") is known[name]
            with segadv.backend(None):
                assert backends.select("cuda") is backends._CUDA
    assert backends.report().splitlines()[4:] == ["cuda: native", *(f"  {name}: can run" for name in known)]
    with segadv.backend("triton"):
        assert backends.report().splitlines()[4] == "cuda: triton (requested)"
    refused.add(("native", "cuda"))
    assert backends.select("cuda") is known["triton"]
    assert backends.select("cpu") is known["native"]
    with segadv.backend("native"):
        message = "backend 'native' was requested for cuda tensors but cannot run: native is off"
        with pytest.raises(RuntimeError, match=message):
            backends.select("cuda")
        assert backends.report().splitlines()[::4] == ["cpu: native (requested)", f"cuda: none ({message})"]
    refused.add(("triton", "cuda"))
    with pytest.warns(RuntimeWarning, match=r"for cuda tensors .native: native is off; triton: triton is off\)"):
        assert backends.select("cuda") is known["reference"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.report().splitlines()[4:] == ["cuda: no GPU is visible to torch"]


@pytest.mark.parametrize("value", ["", "triton"])
def test_the_backend_of_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one asks for nothing; what a thread asks for itself comes first."""
    monkeypatch.setenv("SEGADV_BACKEND", value)
    assert backends.requested() == (value or None)
    with segadv.backend("reference"):
        assert backends.requested() == "reference"


def test_triton_is_refused_with_the_reason_and_never_the_default_on_the_cpu() -> None:
    code = (
        "import torch, segadv\n"
        "from segadv.ops import backends\n"
        "print(backends.default('cpu'))\n"
        "print(backends.report())\n"
        "with segadv.backend('triton'): segadv.functional.l1_norm(torch.rand(1, 2))\n"
    )
    for interpret in ("0", "1"):
        environment = os.environ | {"TRITON_INTERPRET": interpret}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )
        lines = result.stdout.splitlines()
        assert lines[0] == "native"
        reason = "Triton compiles for GPUs; on the CPU its interpreter can run the kernels, slowly: TRITON_INTERPRET=1"
        if interpret == "1":
            assert "  triton: can run" in lines
        else:
            refusal = f"RuntimeError: backend 'triton' was requested for cpu tensors but cannot run: {reason}"
            assert result.stderr.splitlines()[-1] == refusal
            assert f"  triton: cannot run: {reason}" in lines


def test_triton_is_refused_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    reason = backends.BACKENDS["triton"].unavailable.__wrapped__("cuda")
    assert reason == "Triton needs a C compiler at its first call: gcc or clang on the PATH, or CC"


@pytest.mark.parametrize("content", ["", "raise ImportError('broken')"])
def test_a_triton_that_does_not_load_is_a_reason(content: str, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(content)
    code = "from segadv.ops import backends; print(backends.BACKENDS['triton'].unavailable('cuda'))"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("triton does not load: "), result.stderr


@pytest.mark.parametrize(("content", "told"), [("__version__ = '9.9'\n", "9.9"), ("", "None")])
def test_triton_of_another_distribution_is_named(content: str, told: str, tmp_path: Path) -> None:
    """pytorch-triton, pytorch-triton-rocm, triton-windows: no metadata under the name of the module."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(content)
    code = (
        "import importlib.metadata as m\n"
        "def missing(name): raise m.PackageNotFoundError(name)\n"
        "m.version = missing\n"
        "import segadv; print(segadv.build_info()['triton'])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == f"{told}\n", result.stderr


def test_what_is_installed_and_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    core, threads = native.core, torch.get_num_threads()
    best = core.instruction_set()
    try:
        torch.set_num_threads(3)
        for name in core.instruction_sets():
            core.use_instruction_set(name)
            info = segadv.build_info()
            assert (info["instruction_set"], info["threads"]) == (name, 3)
    finally:
        core.use_instruction_set(best)
        torch.set_num_threads(threads)
    assert info["native_path"] == core.__file__
    monkeypatch.setitem(sys.modules, "triton", None)
    assert segadv.build_info()["triton"] is None


def test_import_needs_no_extras() -> None:
    """The drop-in call works where pillow, matplotlib and tqdm are not installed."""
    code = (
        "import sys\n"
        "for name in ('PIL', 'matplotlib', 'tqdm', 'torchvision', 'timm', 'transformers'): sys.modules[name] = None\n"
        "import torch, segadv\n"
        "assert not {'segadv.training', 'segadv.ops.triton_kernels'} & set(sys.modules)\n"
        "segadv.models.wrap, segadv.training.Trainer, segadv.attacks.SegPGD\n"
        "print(segadv.build_info()['native'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"


# --- no full-resolution logits ------------------------------------------------------------------------------------


def test_peak_memory_of_fused_upsampling() -> None:
    """Beyond the returned tensors: less than a twentieth of one full-resolution buffer of logits."""
    code = """
import resource, torch
from segadv import functional as F
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
z, y = torch.randn(1, 150, 96, 96, requires_grad=True), torch.zeros(1, 768, 768, dtype=torch.uint8)
small, tiny = torch.randn(1, 150, 8, 8, requires_grad=True), y[:, :64, :64].clone()
def work(z, y):
    F.gain_and_grad(z, y); F.loss_and_grad(z, y); F.confusion_matrix(z, y); F.argmax_labels(z, y.shape[-2:])
    torch.autograd.grad(F.averaged_gain(z, y).sum() + F.cross_entropy(z, y), z)
work(small, tiny)  # loads code, starts threads
before = peak()
work(z, y)
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    full, returned = 150 * 768 * 768 * 4, 4 * 150 * 96 * 96 * 4 + 3 * 768 * 768 * 4
    assert int(result.stdout) < returned + full / 20


# --- errors -------------------------------------------------------------------------------------------------------

Z, Y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
IMAGES = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.pixel_margin(Z.int(), Y), "logits must have one of the dtypes float32, .*, got int32"),
        (lambda: F.pixel_margin(Z[0], Y), r"logits must be \[N, C, h, w\], .*, got float32 \[3, 4, 4\] on cpu"),
        (
            lambda: F.cross_entropy(Z[:, :1], Y),
            "logits must have at least 2 classes, got 1. Make two channels of a sigmoid output",
        ),
        (
            lambda: F.cross_entropy(Z, Y.float()),
            "labels must have one of the dtypes int64, .*, got float32; labels.long()",
        ),
        (lambda: F.cross_entropy(Z, Y == 1), "labels must have one of the dtypes int64, .*, got bool; labels.long()"),
        (lambda: F.cross_entropy(Z, Z), r"labels must have .*, got float32; labels\.argmax\(1\) makes classes"),
        (
            lambda: F.cross_entropy(Z, Y[:, None]),
            r"labels must be \[N, H, W\] with .* as logits .*, got int64 \[2, 1, 4, 4\] on cpu; labels.squeeze\(1\)",
        ),
        (
            lambda: F.cross_entropy(Z, Y[:, None].expand(-1, 3, -1, -1)),
            r"labels must be \[N, H, W\] with .* as logits .*, got int64 \[2, 3, 4, 4\] on cpu$",
        ),
        (lambda: F.l1_norm(torch.tensor(1.0)), r"grad must be \[N, \.\.\.\], got a scalar"),
        (lambda: F.cross_entropy(Z, Y[0]), r"labels must be \[N, H, W\] with .* as logits .*, got int64 \[4, 4\]"),
        (lambda: F.cross_entropy(Z, Y[:1]), r"\[N, H, W\] with the same N as .*, got int64 \[1, 4, 4\]"),
        (
            lambda: F.cross_entropy(Z[:, :, 0, 0], Y),
            r"labels must be \[N\] with the same N as .*, got int64 \[2, 4, 4\]",
        ),
        (lambda: F.cross_entropy(Z, Y.to("meta")), "labels must be on the logits' device, cpu, got meta"),
        (lambda: F.cross_entropy(Z, Y, reduction="avg"), "reduction must be one of mean, image, .*; got 'avg'"),
        (
            lambda: F.cross_entropy(Z, Y, weight=torch.ones(4)),
            r"weight must be a floating point \[3\] on cpu, got float32 \[4\] on cpu",
        ),
        (lambda: F.segpgd_loss(Z, Y, 4, 4), "step and steps must satisfy 0 <= step < steps, got 4 and 4"),
        (
            lambda: F.loss_and_grad(Z, Y, loss="segpgd"),
            "step and steps must both be given for loss='segpgd', got step=None and",
        ),
        (lambda: F.loss_and_grad(Z, Y, loss="dice"), "loss must be one of cross_entropy, .*; got 'dice'"),
        (lambda: F.argmax_labels(Z, (0, 4)), r"size must be \(H, W\) with both at least 1, got \(0, 4\)"),
        (
            lambda: F.argmax_labels(Z[:, :, :0], (4, 4)),
            r"logits must have at least 1 pixel, got float32 \[2, 3, 0, 4\]",
        ),
        (lambda: F.cross_entropy(Z[..., :0], Y[..., :0]), "logits must have at least 1 pixel, got float32"),
        (lambda: F.sign_step(IMAGES, IMAGES, torch.inf), "alpha must be finite in float32, got inf"),
        (lambda: F.sign_step(IMAGES.double(), IMAGES.double(), np.float32("inf")), "alpha must be finite in float64"),
        (lambda: F.sign_step(IMAGES, IMAGES, np.float16("inf")), "alpha must be finite in float32, got inf"),
        (lambda: F.sign_step(IMAGES, IMAGES, 0.1, bounds=(0, 10**400)), r"bounds must be .*, got \(0, 1000"),
        (lambda: F.sign_step(IMAGES, IMAGES, 0.1, bounds=torch.tensor(1.0)), r"bounds must be .*, got tensor\(1"),
        (lambda: F.sign_step(IMAGES, IMAGES, torch.ones(2).to_sparse()), "alpha must be a dense tensor"),
        (lambda: F.sign_step(IMAGES, IMAGES, torch.nan), "alpha must be finite in float32, got nan"),
        (lambda: F.sign_step(IMAGES, IMAGES, -1e39), "alpha must be finite in float32, got -1e"),  # it would be -inf
        (lambda: F.sign_step(IMAGES, IMAGES, 10**400), "alpha must be finite in float32, got 1000"),
        (lambda: F.sign_step(IMAGES, IMAGES, 0.1, origin=IMAGES, eps=1e39), "eps must be finite in float32, got 1e"),
        (lambda: F.sign_step(IMAGES, IMAGES, "0.1"), r"alpha must be a number, or a tensor \[N\], got a str"),
        (lambda: F.sign_step(IMAGES, IMAGES, None), r"alpha must be a number, or a tensor \[N\], got a NoneType"),
        (lambda: F.sign_step(IMAGES, IMAGES, 0.1, origin=IMAGES, eps=[0.1]), "eps must be a number, or .*, got a list"),
        (
            lambda: F.sign_step(IMAGES, IMAGES, 0.1, bounds=1.0),
            r"bounds must be two numbers, \(low, high\) .*, got 1\.0",
        ),
        (lambda: F.sign_step(IMAGES, IMAGES, 0.1, bounds=("0", "1")), r"bounds must be .*, got \('0', '1'\)"),
        (lambda: F.sign_step(IMAGES, IMAGES, 0.1, bounds=(None, 1.0)), r"bounds must be .*, got \(None, 1\.0\)"),
        (
            lambda: F.sign_step(IMAGES, IMAGES, 0.1, bounds=(torch.zeros(3), torch.ones(3))),
            r"bounds must be two numbers, \(low, high\) with low < high, got \(tensor",
        ),
        (
            lambda: F.newton_step(IMAGES, IMAGES, torch.zeros(2), max_eps="8/255"),
            "max_eps must be a number or None, got a str",
        ),
        (
            lambda: F.newton_step(IMAGES, IMAGES, torch.zeros(2), max_eps=torch.ones(2)),
            "max_eps must be a number or None, got a Tensor",
        ),
        (
            lambda: F.newton_step(IMAGES, IMAGES, torch.zeros(2), clamp_negative=None),
            "clamp_negative must be True or False, got None",
        ),
        (lambda: F.segpgd_loss(Z, Y, 0, 2, targeted=1), "targeted must be True or False, got 1"),
        (lambda: F.cospgd_loss(Z, Y, targeted="False"), "targeted must be True or False, got 'False'"),
        (lambda: F.loss_and_grad(Z, Y, loss="cospgd", targeted=None), "targeted must be True or False, got None"),
        (lambda: F.confusion_matrix(Z, Y, per_image="no"), "per_image must be True or False, got 'no'"),
        (
            lambda: F.cross_entropy(torch.nested.nested_tensor([Z[0], Z[1]]), Y),
            "logits must be a dense tensor, got a nested one",
        ),
        (
            lambda: F.newton_step(IMAGES, IMAGES, torch.zeros(2), bounds=(0, 1, 2)),
            r"bounds must be two numbers, \(low, high\) .*, got \(0, 1, 2\)",
        ),
        (
            lambda: F.newton_step(IMAGES.half(), IMAGES.half(), Z[:, 0, 0, 0]),
            "images must be float32 or float64, got float16 .*; keep images in float32 and use autocast",
        ),
        (
            lambda: F.newton_step(IMAGES, IMAGES[:1], Z[:, 0, 0, 0]),
            r"grad must be like the images, .*\[2, .*, got float32 \[1, ",
        ),
        (lambda: F.sign_step(IMAGES, IMAGES.double(), 0.1), "grad must be like the images, float32 .*, got float64 "),
        (
            lambda: F.newton_step(IMAGES, IMAGES, torch.zeros(3)),
            r"gain must be a floating point \[2\] on cpu, got float32 \[3\]",
        ),
        (
            lambda: F.newton_step(IMAGES, IMAGES, torch.zeros(2), bounds=(1, 0)),
            r"bounds must be .* with low < high, got \(1, 0\)",
        ),
        (lambda: F.newton_step(IMAGES, IMAGES, torch.zeros(2), max_eps=-1), "max_eps must be at least 0, got -1"),
        (
            lambda: F.sign_step(IMAGES, IMAGES, 0.1, eps=0.1),
            "origin and eps must both be given, or neither: .*; got eps alone",
        ),
        (
            lambda: F.sign_step(IMAGES, IMAGES, torch.zeros(3)),
            r"alpha must be a number or a floating point \[2\] on cpu, got float32 \[3\]",
        ),
        (lambda: F.sign_step(IMAGES, IMAGES, 0.1, origin=IMAGES, eps=-0.1), "eps must be at least 0, got -0.1"),
        (lambda: F.sign_step(IMAGES.int(), IMAGES.int(), 0.1), "images must be float32 or float64 .*, got int32"),
        (lambda: F.cross_entropy(Z, Y, ignore_index=2**63), "ignore_index must be a whole number of 64 bits, got 92"),
        (lambda: F.l1_norm(Y), "grad must have one of the dtypes float32, .*, got int64"),
        (
            lambda: F.cross_entropy({"out": Z}, Y),
            "logits must be a tensor, got a dict. Take the logits out of the model's output",
        ),
        (lambda: F.gain_and_grad(Z, None), "labels must be a tensor, got a NoneType"),
        (lambda: F.cross_entropy(Z, Y, weight=[1.0, 1.0, 2.0]), "weight must be a tensor, got a list"),
        (lambda: F.newton_step(IMAGES, IMAGES, 0.5), "gain must be a tensor, got a float"),
        (lambda: F.sign_step(IMAGES, None, 0.1), "grad must be a tensor, got a NoneType"),
        (lambda: F.sign_step(IMAGES.numpy(), IMAGES, 0.1), "images must be a tensor, got a ndarray"),
        (lambda: F.sign_step(IMAGES, IMAGES, 0.1, origin=0.5, eps=0.1), "origin must be a tensor, got a float"),
        (
            lambda: F.sign_step(IMAGES, IMAGES, 0.1, origin=IMAGES.double(), eps=0.1),
            r"origin must be like the images, float32 .*, got float64",
        ),
        (
            lambda: F.sign_step(IMAGES, IMAGES, 0.1, origin=IMAGES[:1], eps=0.1),
            r"origin must be like the images, .*, got float32 \[1, 3, 4, 4\]",
        ),
        (
            lambda: F.sign_step(IMAGES, IMAGES, torch.ones(2, dtype=torch.int64)),
            r"alpha must be a number or .*, got int64 \[2\] on cpu",
        ),
        (
            lambda: F.sign_step(IMAGES, IMAGES, 0.1, bounds=(1, 1)),
            r"bounds must be two numbers, \(low, high\) with low < high, got \(1, 1\)",
        ),
        (
            lambda: F.newton_step(IMAGES, IMAGES, torch.zeros(2), max_eps=torch.nan),
            "max_eps must be at least 0, got nan",
        ),
        (
            lambda: F.newton_step(IMAGES, IMAGES, torch.ones(2).long()),
            r"gain must be a floating point .*, got int64 \[2\] on cpu",
        ),
        (
            lambda: F.cross_entropy(Z, Y, weight=torch.ones(3).long()),
            r"weight must be a floating point .*, got int64 \[3\] on cpu",
        ),
        (lambda: F.l1_norm(0.5), "grad must be a tensor, got a float"),
        (lambda: F.cross_entropy(Z, Y, ignore_index=None), "ignore_index must be a whole number, got a NoneType"),
        (lambda: F.gain_and_grad(Z, Y, ignore_index=255.0), "ignore_index must be a whole number, got a float"),
        (lambda: F.segpgd_loss(Z, Y, 0.5, 2), "step must be a whole number, got a float"),
        (lambda: F.argmax_labels(Z, (4.0, 4)), "size must be a whole number, got a float"),
        (lambda: F.argmax_labels(Z, 4), r"size must be \(H, W\), got 4"),
        (lambda: F.averaged_gain(Z, Y, align_corners="no"), "align_corners must be True or False, got 'no'"),
        (lambda: F.argmax_labels(Z, (4, 4), align_corners=None), "align_corners must be True or False, got None"),
        (lambda: F.cross_entropy(Z.to_sparse(), Y), r"logits must be a dense tensor, .*logits.to_dense\(\) converts"),
        (lambda: F.confusion_matrix(Z, Y.to_sparse()), "labels must be a dense tensor, got one of layout torch.sparse"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 0, (1,)), r"a tensor is \(address, dtype, sizes, strides\)"),
        ((0, 0, (1,) * 5, (1,) * 5), "a tensor of at most 4 dimensions is needed"),
    ],
)
def test_the_core_refuses_what_is_no_view_of_a_tensor(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        native.core.l1_norm(0, 0, given, None, 1)


@pytest.mark.parametrize("own", [(40, 60), (5, 8)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_bad_labels_are_named_with_their_place(
    backend: str, dtype: torch.dtype, own: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    z, y = torch.randn(2, 3, *own), torch.zeros(2, 40, 60, dtype=dtype)
    if z.is_cuda:  # looked for on request only, where it would stall the stream
        monkeypatch.setenv("SEGADV_CHECK", "1")
    y[1, 7, 11] = 3  # as of labels that count from 1
    y[1, 7, 13], y[1, 30, 2] = 77, 78
    message = r"labels must be class indices in \[0, 3\).* or ignore_index = 255, got 3 at \[n, y, x\] = \[1, 7, 11\]"
    calls = (
        F.pixel_margin,
        F.averaged_gain,
        F.gain_and_grad,
        F.cross_entropy,
        F.loss_and_grad,
        F.confusion_matrix,
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(z, y)
    y[0, 0, 0] = 4
    with pytest.raises(ValueError, match=r"or ignore_index = 77, got 4 at \[n, y, x\] = \[0, 0, 0\]"):
        F.averaged_gain(z, y, ignore_index=77)
    y[0, 0, 0] = 0
    if dtype is not torch.uint8:
        y[0, 39, 59] = -1
        with pytest.raises(ValueError, match=r"or ignore_index = 255, got -1 at \[n, y, x\] = \[0, 39, 59\]"):
            F.averaged_gain(z, y)
        assert F.averaged_gain(z, torch.full_like(y, -1), ignore_index=-1).tolist() == [0, 0]


@pytest.mark.parametrize("own", [(2, 2), (3, 4), (8, 8)])
def test_bad_labels_spoil_all_of_their_image_in_the_reference(
    own: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where they are not looked for. Of 8 x 8 logits 2 x 2 labels leave most out."""
    monkeypatch.setattr("segadv.ops.reference.check_labels", lambda *_: None)
    z, y = torch.randn(3, 4, *own, requires_grad=True), torch.zeros(3, 2, 2, dtype=torch.long)
    y[1, 0, 0] = 7
    with segadv.backend("reference"):
        grads = {"gain_and_grad": F.gain_and_grad(z, y)[2], "loss_and_grad": F.loss_and_grad(z, y)[2]}
        for function in (F.pixel_margin, F.averaged_gain, F.cospgd_loss):
            grads[function.__name__] = torch.autograd.grad(function(z, y).sum(), z)[0]
        per_image = F.cross_entropy(z, y, reduction="image")
        grads["cross_entropy"] = torch.autograd.grad(per_image.sum(), z)[0]
    for name, grad in grads.items():
        assert grad[1].isnan().all(), name
        assert grad[[0, 2]].isfinite().all(), name


@pytest.mark.parametrize("own", [(6, 8), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_any_number_can_be_ignored(backend: str, dtype: torch.dtype, own: tuple[int, int]) -> None:
    """One that is a class, one that the labels' type holds, or one that it does not."""
    z = torch.randn(1, 5, *own)
    y = torch.arange(48).view(1, 6, 8).remainder(5).to(dtype)
    known = torch.iinfo(dtype)
    ends = (known.min, known.max, -1 if known.min else 0)
    for ignored in (*ends, 3, -100, 300, 2**15, -(2**31), 2**31 - 1, 2**31, 2**32 + 1, -(2**63), 2**63 - 1):
        given = y.clone()
        holds = known.min <= ignored <= known.max
        if holds:
            given[0, 2, 3:6] = ignored
        n_valid = int((given != ignored).sum()) if holds else given.numel()
        assert F.gain_and_grad(z, given, ignore_index=ignored)[1].tolist() == [n_valid], ignored
        counts = F.confusion_matrix(z, given, ignore_index=ignored)
        assert int(counts.sum()) == n_valid, ignored


@pytest.mark.parametrize(("value", "on"), [("", False), ("0", False), ("1", True)])
def test_checks_that_wait_for_the_gpu_are_asked_for(value: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGADV_CHECK", value)
    assert common.synchronous_checks() is on


def test_compiled_code_has_no_synchronous_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values stand for a GPU's: that they are looked at shows."""
    monkeypatch.setenv("SEGADV_CHECK", "1")
    z, y = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, 8, 10, device="meta", dtype=torch.int64)
    call = functools.partial(F.cross_entropy, z, y, reduction="image")
    with pytest.raises(RuntimeError, match="meta"):
        call()
    assert torch.compile(call, fullgraph=True, backend="eager")().shape == (2,)


def test_huge_label_values_do_not_wrap() -> None:
    z, y = torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long)
    y[0, 0, 1] = 2**32 + 1
    with pytest.raises(ValueError, match=str(2**32 + 1)):
        F.averaged_gain(z, y)
