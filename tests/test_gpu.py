"""What only a GPU can show: streams, graphs, waiting, memory, large tensors. The contract tests run there as well."""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from test_attacks import CLASSES, IGNORE, Net, every_attack, make, sample
from torch import Tensor
from torch.utils.data import TensorDataset

import segadv
from segadv import functional as F
from segadv.attacks import FastNewton
from segadv.models import small_pspnet
from segadv.ops import backends
from segadv.training import TrainConfig, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DEVICE = torch.device("cuda")
# The reference, which is eager PyTorch, promises neither the same bits nor little memory.
ON_GPU = [
    name
    for name, module in backends.BACKENDS.items()
    if name != "reference" and torch.cuda.is_available() and module.unavailable("cuda") is None
]

SIZE = (192, 256)
SIZES = {"full": SIZE, "up": (24, 32), "odd": (75, 90), "down": (200, 300)}
every_size = pytest.mark.parametrize("own", SIZES.values(), ids=SIZES)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True, params=ON_GPU or ["none"])
def _every_gpu_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with segadv.backend(request.param):
        yield


@pytest.fixture
def _deterministic_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


# --- every operation ----------------------------------------------------------------------------------------------


def inputs(own: tuple[int, int], dtype: torch.dtype = torch.float32, *, channels_last: bool = False) -> Inputs:
    """Logits [3, 19, *own], labels with a void border, images and a gradient."""
    z = torch.randn(3, 19, *own).to(dtype)
    y = torch.randint(0, 19, (3, *SIZE))
    y[:, :5] = 255
    images, grad = torch.rand(3, 3, *SIZE), torch.randn(3, 3, *SIZE)
    if channels_last:
        z, images, grad = (t.contiguous(memory_format=torch.channels_last) for t in (z, images, grad))
    return z.to(DEVICE), y.to(DEVICE), images.to(DEVICE), grad.to(DEVICE)


DIFFERENTIABLE = ("pixel_margin", "averaged_gain", "cross_entropy", "segpgd_loss", "cospgd_loss")
WITHOUT_LABELS = ("l1_norm", "newton_step", "newton_step eps", "sign_step", "argmax_labels")


def values(z: Tensor, y: Tensor, images: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The results of every operation."""
    result = {
        "pixel_margin": F.pixel_margin(z, y),
        "averaged_gain": F.averaged_gain(z, y),
        "cross_entropy": F.cross_entropy(z, y, reduction="image"),
        "segpgd_loss": F.segpgd_loss(z, y, 1, 4),
        "cospgd_loss": F.cospgd_loss(z, y),
        "l1_norm": F.l1_norm(grad),
        "sign_step": F.sign_step(images, grad, 0.02, origin=images, eps=0.01),
        "confusion_matrix": F.confusion_matrix(z, y, per_image=True),
        "argmax_labels": F.argmax_labels(z, SIZE),
    }
    result["newton_step"], result["newton_step eps"] = F.newton_step(images, grad, 0.01 * result["l1_norm"])
    in_one_pass = {"gain_and_grad": F.gain_and_grad(z, y)}
    for loss in ("cross_entropy", "segpgd", "cospgd"):
        in_one_pass[f"loss_and_grad {loss}"] = F.loss_and_grad(z, y, loss=loss, step=1, steps=4)
        in_one_pass[f"balanced {loss}"] = F.loss_and_grad(z, y, loss=loss, step=1, steps=4, balanced=True)
    for name, (total, n_valid, gradient) in in_one_pass.items():
        result |= {name: total, f"n_valid of {name}": n_valid, f"gradient of {name}": gradient}
    return result


def results(z: Tensor, y: Tensor, images: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The same, and the gradients that autograd finds."""
    leaf = z.detach().requires_grad_()
    result = values(leaf, y, images, grad)
    for name in DIFFERENTIABLE:
        (result[f"autograd of {name}"],) = torch.autograd.grad(result[name].sum(), leaf)
    return {name: tensor.detach() for name, tensor in result.items()}


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different, f"not the same bits: {different}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_size
def test_the_same_bits_in_20_runs(own: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = inputs(own, dtype, channels_last=dtype is torch.bfloat16)
    first = results(*tensors)
    for _ in range(19):
        assert_same_bits(results(*tensors), first)


@every_size
def test_the_same_bits_on_another_stream(own: tuple[int, int]) -> None:
    tensors = inputs(own)
    expected = results(*tensors)
    late = tuple(torch.zeros_like(t) for t in tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on any other stream would come before the copies
        for target, source in zip(late, tensors, strict=True):
            target.copy_(source)
        got = results(*late)
    stream.synchronize()
    assert_same_bits(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
@every_size
def test_tensors_of_another_than_the_current_device(own: tuple[int, int]) -> None:
    tensors = inputs(own)
    expected = results(*tensors)
    got = results(*(t.to("cuda:1") for t in tensors))
    assert {t.device.index for t in got.values()} == {1}
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].to(DEVICE), tensor, msg=lambda text, name=name: f"{name}: {text}")


@every_size
def test_compile_fullgraph_with_inductor(own: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    backend = backends.requested()
    assert backend is not None
    monkeypatch.setenv("SEGADV_BACKEND", backend)  # for the backward, in autograd's thread
    z, y, images, grad = inputs(own)

    def function(z: Tensor) -> dict[str, Tensor]:
        return values(z * 1.5, y, images, grad)

    outcomes = []
    for call in (function, torch.compile(function, fullgraph=True)):
        leaf = z.clone().requires_grad_()
        outcome = call(leaf)
        total = torch.stack([outcome[name].sum() for name in DIFFERENTIABLE]).sum()
        outcomes.append(outcome | {"autograd": torch.autograd.grad(total, leaf)[0]})
    for name, tensor in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], tensor, msg=lambda text, name=name: f"{name}: {text}")


# --- nothing waits, nothing stays ---------------------------------------------------------------------------------


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def attack_inputs() -> tuple[Net, Tensor, Tensor]:
    """A convolutional network in train mode, images and labels."""
    model = Net(dtype=torch.float32).to(DEVICE)
    images, labels = sample(3, (48, 64), torch.float32)
    return model, images.to(DEVICE), labels.to(DEVICE)


def test_that_waiting_is_noticed() -> None:
    count = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_is_an_error():
        count.sum().item()


def test_the_range_of_images_is_looked_at_once() -> None:
    """In the first call with a model that gets images in it."""
    model, images, labels = attack_inputs()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"images: pixels must be in \[0, 1\], found .*segadv.models.wrap"):
            segadv.fast_newton_step(model, 3 * images - 1, labels)
    segadv.fast_newton_step(model, images, labels)
    segadv.fast_newton_step(model, 3 * images - 1, labels)


@every_size
def test_operations_do_not_wait(own: tuple[int, int]) -> None:
    tensors = inputs(own)
    results(*tensors)  # compiles
    with waiting_is_an_error():
        results(*tensors)


@every_attack
def test_attacks_do_not_wait(name: str) -> None:
    model, images, labels = attack_inputs()
    attack = make(name, model)

    def run() -> None:
        attack(images, labels)
        segadv.fast_newton_step(model, images, labels, return_info=True)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            attack(images, labels)

    run()  # compiles
    with waiting_is_an_error():
        run()


def assert_no_growth(call: Callable[[], object], calls: int = 1000) -> None:
    for _ in range(3):
        call()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(calls):
        call()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@every_size
def test_no_memory_growth_of_operations(own: tuple[int, int]) -> None:
    tensors = inputs(own)
    assert_no_growth(lambda: results(*tensors))


def test_no_memory_growth_of_fast_newton_step() -> None:
    model, images, labels = attack_inputs()
    assert_no_growth(lambda: segadv.fast_newton_step(model, images, labels, return_info=True))


# --- CUDA graphs --------------------------------------------------------------------------------------------------


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@every_attack
@pytest.mark.usefixtures("_deterministic_convolutions")
def test_capture_and_replay_of_a_whole_attack(name: str) -> None:
    model, images, labels = attack_inputs()
    attack = make(name, model)
    graph, adversarial = captured(lambda: attack(images, labels))
    for seed in (1, 2):
        others, other_labels = sample(3, (48, 64), torch.float32)
        images.copy_(others)
        labels.copy_(other_labels)
        torch.manual_seed(seed)  # the graph draws from the default generator as it is when replayed
        graph.replay()
        got = adversarial.clone()
        torch.manual_seed(seed)
        assert torch.equal(got, attack(images, labels))
        assert not torch.equal(got, images)


@pytest.mark.usefixtures("_deterministic_convolutions")
def test_capture_and_replay_of_fast_newton_under_autocast() -> None:
    model, images, labels = attack_inputs()
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)

    def call() -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return FastNewton(model)(images, labels)

    graph, adversarial = captured(call)
    images.copy_(images.flip(0))
    graph.replay()
    got = adversarial.clone()
    assert torch.equal(got, call())


@pytest.mark.parametrize("name", ["checkpoint-fgsm", "pgd-restarts", "fast-newton"])
@pytest.mark.usefixtures("_deterministic_convolutions")
def test_a_model_compiled_to_cuda_graphs(name: str) -> None:
    """Each of its passes writes over what the one before gave."""
    torch._dynamo.reset()
    model, images, labels = attack_inputs()
    attacks = [make(name, torch.compile(model, mode=mode)) for mode in ("default", "reduce-overhead")]
    outcomes = []
    for attack in attacks:
        for _ in range(3):  # graphs are recorded in the second call and replayed in the third
            gradient = attack.input_gradient(images, labels)
            torch.manual_seed(0)
            outcome = [*attack(images, labels, return_info=True), gradient]
        outcomes.append(outcome)
    (plain, plain_info, plain_gradient), (graphed, info, gradient) = outcomes
    torch.testing.assert_close(gradient, plain_gradient)
    torch.testing.assert_close(info.eps, plain_info.eps)
    assert ((graphed - plain).abs() > 1e-6).float().mean() < 1e-3  # a sign may turn where the gradient is almost 0


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [77, -1, 2**32 + 1])
@every_size
def test_bad_labels_spoil_their_image_only(own: tuple[int, int], bad: int) -> None:
    z, y, images, grad = inputs(own)
    clean = results(z, y, images, grad)
    y[1, 7, 11] = y[1, -1, -1] = bad
    spoilt = results(z, y, images, grad)
    for name, expected in clean.items():
        assert torch.equal(spoilt[name][::2], expected[::2]), name
        if name in WITHOUT_LABELS:
            assert torch.equal(spoilt[name], expected), name
        elif expected.is_floating_point():
            assert spoilt[name][1].isnan().all(), name
    matrix = F.confusion_matrix(z, y)
    assert matrix.invalid.item() == 2  # type: ignore[attr-defined]
    assert matrix.sum() == (y != 255).sum() - 2
    assert torch.equal(matrix, spoilt["confusion_matrix"].sum(0))
    assert F.cross_entropy(z, y).isnan()


@pytest.mark.usefixtures("_deterministic_convolutions")
def test_an_image_with_a_bad_label_is_not_attacked() -> None:
    model, images, labels = attack_inputs()
    clean = segadv.fast_newton_step(model, images, labels)
    labels[1, 3, 4] = CLASSES
    adversarial, info = segadv.fast_newton_step(model, images, labels, return_info=True)
    assert info.gain.isnan().tolist() == [False, True, False]
    assert info.eps[1] == 0
    assert torch.equal(adversarial[1], images[1])
    assert torch.equal(adversarial[::2], clean[::2])


@every_size
def test_synchronous_checks(own: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    z, y, _, _ = inputs(own)
    y[1, 7, 11] = 77
    with segadv.backend("native"), pytest.raises(ValueError, match="got 77 at") as on_cpu:
        F.averaged_gain(z.cpu(), y.cpu())
    monkeypatch.setenv("SEGADV_CHECK", "1")
    calls = (F.pixel_margin, F.averaged_gain, F.gain_and_grad, F.cross_entropy, F.loss_and_grad, F.confusion_matrix)
    for call in calls:
        with pytest.raises(ValueError, match=f"^{re.escape(str(on_cpu.value))}$"):
            call(z, y)


def test_synchronous_checks_are_refused_during_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y, _, _ = inputs(SIZES["up"])
    F.averaged_gain(z, y)
    z.mul_(1.0)  # loaded now, not during the capture
    monkeypatch.setenv("SEGADV_CHECK", "1")
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        z.mul_(1.0)  # an empty graph would warn
        with pytest.raises(RuntimeError, match="SEGADV_CHECK=1 waits for the GPU"):
            F.averaged_gain(z, y)


# --- bfloat16 under autocast, channels_last -----------------------------------------------------------------------


def test_autocast_and_channels_last_within_the_error_rule() -> None:
    model, images, labels = attack_inputs()
    model = model.to(memory_format=torch.channels_last).eval()
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), torch.no_grad():
        logits = model(images)
    assert logits.dtype is torch.bfloat16
    assert logits.is_contiguous(memory_format=torch.channels_last)
    case = oracle.leave_out_ties(oracle.Case(logits, labels, IGNORE, False, 0))
    assert case.left_out <= 0.05 * labels.numel()

    def mean_over_valid(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda z: oracle.mean_over_valid(function(z, case.labels), case.labels)

    for ours, plain in (
        (F.averaged_gain, oracle.pixel_margin),
        (lambda z, y: F.cross_entropy(z, y, reduction="image"), oracle.cross_entropy_map),
    ):
        z, z_eager, z64 = (t.detach().requires_grad_() for t in (logits, logits.clone(), logits.double()))
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            value = ours(z, case.labels)
        eager, truth = mean_over_valid(plain)(z_eager), mean_over_valid(plain)(z64)
        size = mean_over_valid(lambda z, y, plain=plain: plain(z, y).abs())(z64)
        oracle.assert_accurate(value, eager, truth, "value", addends=size)
        grads = [torch.autograd.grad(v.sum(), leaf)[0] for v, leaf in ((value, z), (eager, z_eager), (truth, z64))]
        assert grads[0].is_contiguous(memory_format=torch.channels_last)
        oracle.assert_accurate(*grads, "gradient")
        oracle.assert_same_direction(*grads, "gradient")

    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        adversarial, info = segadv.fast_newton_step(model, images, labels, return_info=True)
    assert adversarial.dtype is torch.float32
    assert adversarial.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(info.eps, info.gain / info.grad_norm)
    plain_info = segadv.fast_newton_step(model, images, labels, return_info=True)[1]
    torch.testing.assert_close(info.gain, plain_info.gain, rtol=0.05, atol=0.02)  # the network's own rounding


# --- more than 2**31 elements -------------------------------------------------------------------------------------


def require_memory(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:g} GiB of GPU memory, {free:.1f} are free")


def check_large_logits(count: int, classes: int, side: int) -> None:
    """Images that are all alike have results that are all alike, those of one alone; the last rows equal eager's."""
    one = torch.randn(1, classes, side, side, device=DEVICE, dtype=torch.bfloat16)
    z = one.repeat(count, 1, 1, 1)
    for size in (side, side // 8):
        y_one = torch.randint(0, classes, (1, size, size), device=DEVICE, dtype=torch.uint8)
        y = y_one.repeat(count, 1, 1)
        calls: tuple[Callable[[Tensor, Tensor], tuple[Tensor, ...]], ...] = (
            F.gain_and_grad,
            F.loss_and_grad,
            lambda z, y: (F.confusion_matrix(z, y, per_image=True), F.argmax_labels(z, y.shape[-2:])),
        )
        for call in calls:
            for got, expected in zip(call(z, y), call(one, y_one), strict=True):
                for image in got:
                    if got.dim() == 1:  # sums, whose order may depend on the number of images
                        torch.testing.assert_close(image, expected[0])
                    else:
                        assert torch.equal(image, expected[0])
    # Directly, at the end of the memory: argmax and margin of the last rows.
    y = torch.randint(0, classes, (count, side, side), device=DEVICE, dtype=torch.uint8)
    end = z[-1:, :, -8:].double()
    margin = F.pixel_margin(z, y)[-1:, -8:]
    torch.testing.assert_close(margin.double(), oracle.pixel_margin(end, y[-1:, -8:]), rtol=1e-6, atol=1e-6)
    assert torch.equal(F.argmax_labels(z, (side, side))[-1:, -8:].long(), end.argmax(1))


@pytest.mark.parametrize(("count", "classes", "side"), [(4, 19, 5376), (1, 150, 3840)])
def test_logits_of_more_than_2_to_31_elements(count: int, classes: int, side: int) -> None:
    assert count * classes * side**2 > 2**31
    require_memory(30)
    check_large_logits(count, classes, side)


def check_large_steps(count: int, side: int) -> None:
    images = torch.rand(count, 3, side, side, device=DEVICE)
    grad = torch.randn(count, 3, side, side, device=DEVICE)
    norm = torch.stack([image.abs().sum(dtype=torch.float64) for image in grad])
    torch.testing.assert_close(F.l1_norm(grad).double(), norm, rtol=1e-6, atol=0)

    def end(t: Tensor) -> Tensor:
        return t[-1, -1, -8:]

    adversarial, eps = F.newton_step(images, grad, (0.01 * norm).float())
    torch.testing.assert_close(eps, torch.full_like(eps, 0.01), rtol=1e-5, atol=0)
    expected = (end(images) - eps[-1] * end(grad).sign()).clamp(0, 1)
    torch.testing.assert_close(end(adversarial), expected, rtol=0, atol=1e-6)
    del adversarial
    stepped = F.sign_step(images, grad, 0.02, origin=images, eps=0.01)
    expected = (end(images) + 0.01 * end(grad).sign()).clamp(0, 1)
    torch.testing.assert_close(end(stepped), expected, rtol=0, atol=1e-6)


def test_steps_on_more_than_2_to_31_elements() -> None:
    count, side = 4, 13400
    assert count * 3 * side**2 > 2**31
    require_memory(36)
    check_large_steps(count, side)


# --- the trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16", "channels_last": True},
        {"precision": "fp16"},
        {"precision": "fp16", "accumulation": 2},
        {"compile": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("arm", ["basic", "fast-newton", "segpgd-3"])
def test_training_and_continuing(
    tmp_path: Path, options: dict[str, Any], arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half, from a checkpoint, has the coins, data and schedule of the uninterrupted run."""
    torch._dynamo.reset()  # after too many shapes in one process it would no longer compile
    backend = backends.requested()
    assert backend is not None
    monkeypatch.setenv("SEGADV_BACKEND", backend)  # for the backward, in autograd's thread
    settings = {"arm": arm, "batch_size": 8, "crop": (64, 64), "device": "cuda", "log_every": 2, "monitor_every": 0}

    def trainer(**changes: Any) -> Trainer:
        torch.manual_seed(0)
        dataset = TensorDataset(torch.rand(16, 3, 80, 80), torch.randint(0, 19, (16, 80, 80), dtype=torch.uint8))
        config = TrainConfig(**settings, **options, steps=6, **changes)
        return Trainer(config, small_pspnet(), dataset)

    whole, stopped = trainer(), trainer(checkpoint_every=4)
    whole.run(tmp_path / "whole", progress=False)
    save = stopped.save

    def save_and_stop(path: str) -> None:
        save(path)
        raise RuntimeError("stop")

    stopped.save = save_and_stop  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="stop"):
        stopped.run(tmp_path / "parts", progress=False)
    trainer().run(tmp_path / "parts", progress=False)
    lines = [
        [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        for folder in ("whole", "parts")
    ]
    for one, other in zip(*lines, strict=True):
        assert (one["step"], one["learning_rate"]) == (other["step"], other["learning_rate"])
        assert one["adversarial_share"] == other["adversarial_share"]
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)  # atomic additions of cuDNN and of half precision
        assert math.isfinite(one["loss"])
