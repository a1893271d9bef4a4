"""What is CUDA's own: walks over the pixels, the order of threads, unwritten memory, bad labels, errors, the emulation.

The kernels run emulated on the CPU (tests/cuda/emulation.h); what only a GPU can show is in test_gpu.py.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import emulated
import oracle
import pytest
import torch
from torch import Tensor

import segadv
from segadv import functional as F
from segadv.ops import backends, native
from segadv.ops.native import compiled_for

# own size, labels' size: vectors; no vectors; columns of 8 pixels; 4; two chunks; a pixel more than 8; one pixel each;
# fewer; a quad wider than a block; more quads than a block takes
SIZES = (
    ((24, 40), (24, 40)),
    ((25, 37), (25, 37)),
    ((5, 9), (40, 72)),
    ((6, 7), (25, 37)),
    ((2, 9), (40, 21)),
    ((3, 3), (27, 27)),
    ((13, 20), (25, 37)),
    ((60, 70), (7, 9)),
    ((3, 40), (3, 5)),
    ((1, 1), (5, 300)),
    ((5, 66), (9, 100)),
)


def everything(z: Tensor, y: Tensor, *, align_corners: bool = False) -> dict[str, Tensor]:
    """All floating results of all operations on pixels, gradients included; z requires a gradient."""
    options = {"align_corners": align_corners}
    weight = torch.linspace(0.5, 1.5, z.shape[1])
    results = {}
    results["gain_sum"], results["n_valid"], results["gradient of gain_sum"] = F.gain_and_grad(z, y, **options)
    for loss in ("cross_entropy", "segpgd", "cospgd"):
        results[loss], _, results[f"gradient of {loss}"] = F.loss_and_grad(
            z, y, loss=loss, step=1, steps=4, targeted=loss == "cospgd", **options
        )
    results["pixel_margin"] = F.pixel_margin(z, y, **options)
    results["averaged_gain"] = F.averaged_gain(z, y, **options)
    results["pixel_loss"] = F.cross_entropy(z, y, weight=weight, reduction="none", **options)
    results["image_loss"] = F.cross_entropy(z, y, weight=weight, reduction="image", **options)
    results["segpgd_loss"] = F.segpgd_loss(z, y, 1, 4, **options)
    results["cospgd_loss"] = F.cospgd_loss(z, y, **options)
    for name in ("pixel_margin", "averaged_gain", "pixel_loss", "image_loss", "segpgd_loss", "cospgd_loss"):
        outgoing = torch.linspace(1, 2, results[name].numel(), dtype=results[name].dtype).view_as(results[name])
        (results[f"backward of {name}"],) = torch.autograd.grad(results[name], z, outgoing)
    return {name: value.detach() for name, value in results.items()}


def case(own: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    z = oracle.in_layout(torch.randn(2, 5, *own).to(dtype), layout).requires_grad_()
    y = torch.randint(0, 5, (2, *size))
    y[0, : size[0] // 3] = 255
    return z, y


@pytest.mark.parametrize(
    ("layout", "align_corners"),
    [("contiguous", False), ("channels_last", True), ("sliced", False), ("shifted", True)],
)
@pytest.mark.parametrize(("own", "size"), SIZES, ids=str)
def test_every_walk_gives_the_native_result(
    own: tuple[int, int], size: tuple[int, int], layout: str, align_corners: bool
) -> None:
    """Many blocks in every direction, against the native backend."""
    z, y = case(own, size, torch.float32, "contiguous" if layout == "shifted" else layout)
    if layout == "shifted":  # dense, but not at a multiple of 16 bytes
        z, y = oracle.shifted(z.detach()).requires_grad_(), oracle.shifted(y)
    with segadv.backend("native"):
        expected = everything(z, y, align_corners=align_corners)
        matrix = F.confusion_matrix(z, y, per_image=True, align_corners=align_corners)
        prediction = F.argmax_labels(z, size, align_corners=align_corners)
    with segadv.backend("cuda-emulated"):
        results = everything(z, y, align_corners=align_corners)
        assert torch.equal(F.confusion_matrix(z, y, per_image=True, align_corners=align_corners), matrix)
        assert torch.equal(F.argmax_labels(z, size, align_corners=align_corners), prediction)
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def compare_with_native(
    z: Tensor, y: Tensor, *, align_corners: bool = False, tolerance: float = 2e-5
) -> dict[str, Tensor]:
    """All floating results, NaN where native has NaN."""
    with segadv.backend("native"):
        expected = everything(z, y, align_corners=align_corners)
    with segadv.backend("cuda-emulated"):
        results = everything(z, y, align_corners=align_corners)
    for name, value in results.items():
        scale = expected[name].nan_to_num(0, 0, 0).abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            value / scale, expected[name] / scale, rtol=tolerance, atol=tolerance, equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip
    return results


@pytest.mark.parametrize("classes", [2, 24, 25, 48, 300])
@pytest.mark.parametrize(
    ("own", "size"), [((3, 5), (24, 40)), ((4, 9), (16, 36)), ((3, 3), (7, 5)), ((6, 5), (3, 4))], ids=str
)
def test_any_number_of_classes(own: tuple[int, int], size: tuple[int, int], classes: int) -> None:
    """A block of the resampled gradient has at most 24 classes at once."""
    z, y = torch.randn(2, classes, *own, requires_grad=True), torch.randint(0, classes, (2, *size))
    y[0, -1] = 255 if classes < 256 else 3
    compare_with_native(z, y, align_corners=classes == 25)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("own", "size"), [((3, 5), (24, 40)), ((4, 9), (16, 36)), ((3, 4), (7, 5))], ids=str)
def test_logits_that_no_shortcut_serves(own: tuple[int, int], size: tuple[int, int], align_corners: bool) -> None:
    """Neighbours hundreds apart; far from zero; classes masked out; NaN next to void pixels."""
    y = torch.randint(0, 5, (2, *size))
    y[0, : size[0] // 2], y[1, :, : size[1] // 2] = 255, 255
    z = torch.randn(2, 5, *own)
    # A logit of 1000 is known to 1000 * 6e-8.
    compare_with_native((z * 300).requires_grad_(), y, align_corners=align_corners, tolerance=5e-4)
    compare_with_native((z - 1000).requires_grad_(), y, align_corners=align_corners, tolerance=5e-4)
    compare_with_native((z * 1e36).requires_grad_(), y, align_corners=align_corners)
    for lowest in (-1e30, torch.finfo(torch.float32).min):
        masked = z.clone()
        masked[:, 3] = lowest
        results = compare_with_native(masked.requires_grad_(), torch.where(y == 3, 2, y), align_corners=align_corners)
        assert results["gradient of cross_entropy"].isfinite().all()
    broken = z.clone()
    broken[0, 1, 0, 0], broken[1, 2, -1, -1] = torch.nan, torch.nan
    compare_with_native(broken.requires_grad_(), y, align_corners=align_corners)


def test_more_blocks_than_a_block_has_threads() -> None:
    """So many that a thread of the last kernel adds up several of them."""
    z, y = torch.randn(2, 2, 121, 71), torch.randint(0, 2, (2, 121, 71))
    y[0, :50], y[1, 100, 70] = 255, 255
    results = []
    for name in ("native", "cuda-emulated"):
        with segadv.backend(name):
            gain_sum, n_valid, _ = F.gain_and_grad(z, y)
            results.append((gain_sum, n_valid, F.cross_entropy(z, y, reduction="image")))
    assert results[1][1].tolist() == [71 * 71, 121 * 71 - 1]
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("images", "classes", "own", "size"),
    [
        (16, 9, (64, 64), (7, 9)),
        (16, 12, (50, 70), (30, 40)),
        (2, 60, (60, 60), (60, 70)),
        (342, 25, (8, 1), (1, 1)),  # more blocks than with float64
    ],
    ids=str,
)
def test_gradients_with_more_rows_of_warps_stay_inside_of_their_workspace(
    images: int, classes: int, own: tuple[int, int], size: tuple[int, int]
) -> None:
    """The margin's gradient has more classes to a warp, and may have more blocks for it; conftest.py looks behind."""
    z, y = torch.randn(images, classes, *own, requires_grad=True), torch.randint(0, classes, (images, *size))
    found = []
    for name in ("native", "cuda-emulated"):
        with segadv.backend(name):
            found.append(torch.autograd.grad(F.pixel_margin(z, y).sum() + F.averaged_gain(z, y).sum(), z)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_gradients_of_aligned_corners_stay_inside_of_their_workspace() -> None:
    """Which is larger than without: a logit has more pixels. emulated.py looks behind it."""
    z, y = torch.randn(2, 150, 3, 2, requires_grad=True), torch.randint(0, 150, (2, 4, 40))
    compare_with_native(z, y, align_corners=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("own", "size"), [SIZES[0], SIZES[2], SIZES[6]], ids=str)
def test_walks_in_half_precision(own: tuple[int, int], size: tuple[int, int], dtype: torch.dtype) -> None:
    z, y = case(own, size, dtype, "contiguous")
    with segadv.backend("native"):
        expected = everything(z, y)
    with segadv.backend("cuda-emulated"):
        results = everything(z, y)
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("own", "size"), [SIZES[0], SIZES[2], SIZES[6]], ids=str)
def test_same_bits_for_any_order_of_threads_and_blocks(own: tuple[int, int], size: tuple[int, int]) -> None:
    z, y = case(own, size, torch.float32, "contiguous")
    images, grad, gain = torch.rand(2, 3, 40, 41), torch.randn(2, 3, 40, 41), torch.ones(2)
    results = []
    with segadv.backend("cuda-emulated"):
        for seed in range(6):
            emulated.load().seed(seed)
            adversarial, eps = F.newton_step(images, grad, gain)
            results.append([*everything(z, y).values(), F.confusion_matrix(z, y), adversarial, eps, F.l1_norm(grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def no_fresh_memory_is_zero() -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(("own", "size"), SIZES, ids=str)
def test_every_element_is_written(no_fresh_memory_is_zero: None, own: tuple[int, int], size: tuple[int, int]) -> None:
    z, y = case(own, size, torch.float32, "contiguous")
    with segadv.backend("cuda-emulated"):
        for name, value in everything(z, y).items():
            assert value.isfinite().all(), name
        assert F.confusion_matrix(z, y).sum() == (y != 255).sum()
        assert F.argmax_labels(z, size).max() < 5
        assert F.sign_step(z.detach(), z.detach(), 0.1).isfinite().all()


@pytest.mark.parametrize(("own", "size"), [((8, 10), (8, 10)), ((3, 4), (8, 10)), ((2, 2), (8, 10))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_labels_make_their_image_nan_and_no_other(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, own: tuple[int, int], size: tuple[int, int]
) -> None:
    """What happens on a GPU, where nothing waits for a check: tried here with the check of CPU labels taken out."""
    monkeypatch.setattr(backends.BACKENDS["cuda-emulated"], "check_labels", lambda *_: None)
    z = torch.randn(3, 5, *own).to(dtype).requires_grad_()
    good = torch.randint(0, 5, (3, *size))
    good[0, 0] = 255
    with segadv.backend("cuda-emulated"):
        expected = everything(z, good)
        expected.pop("n_valid")
        for labels in ({(7, 9): 5}, {(0, 0): 2**32 + 1, (0, 1): 7, (3, 2): -7}):
            bad = good.clone()
            for at, label in labels.items():
                bad[(1, *at)] = label
            results = everything(z, bad)
            assert results.pop("n_valid").tolist() == [70, 80 - len(labels), 80]
            for name, value in results.items():
                assert value[1].isnan().all(), name
                assert torch.equal(value[[0, 2]], expected[name][[0, 2]]), name
            for per_image in (False, True):
                matrix = F.confusion_matrix(z, bad, per_image=per_image)
                assert matrix.invalid.item() == len(labels)
                assert matrix.sum().item() == 70 + 80 - len(labels) + 80


def test_a_bad_label_in_one_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last kernel's threads look at several blocks each, and several of its own write NaN."""
    monkeypatch.setattr(backends.BACKENDS["cuda-emulated"], "check_labels", lambda *_: None)
    z, y = torch.randn(2, 2, 121, 71), torch.randint(0, 2, (2, 121, 71))
    y[1, 0, 0] = 2
    with segadv.backend("cuda-emulated"):
        gain_sum, n_valid, grad = F.gain_and_grad(z, y)
        for value in (gain_sum, grad, F.pixel_margin(z, y)):
            assert value[0].isfinite().all()
            assert value[1].isnan().all()
    assert n_valid.tolist() == [121 * 71, 121 * 71 - 1]


def test_errors_name_the_kernel_and_the_sizes() -> None:
    core = emulated.load()
    one = torch.ones(1)
    row = (one.data_ptr(), 0, (), ())
    with pytest.raises(
        RuntimeError, match=r"kernel absolute_sum failed for 2147483648 images of 1 elements: .* too large"
    ):
        core.l1_norm(2**31, 1, row, row, 0, 0)
    for own, size in (((1, 2**20), (1, 2**31)), ((2**20, 1), (2**31, 1))):
        wide = (one.data_ptr(), 0, (1, 2, *own), (0, 0, 0, 0)), (one.data_ptr(), 4, (1, *size), (0, 0, 0))
        with pytest.raises(RuntimeError, match=r"kernel resampling failed .*: an image is too large: a side of about"):
            core.margin(*wide, None, 255, False, None, None, None, None, 0, 0)
        with pytest.raises(RuntimeError, match=r"kernel resampling failed .*: an image is too large: a side of about"):
            core.margin_backward(*wide, wide[0], 255, False, None, None, 0, 0)
    logits, labels = (one.data_ptr(), 0, (2**32, 2, 1, 1), (0, 0, 0, 0)), (one.data_ptr(), 4, (2**32, 1, 1), (0, 0, 0))
    with pytest.raises(
        RuntimeError, match=r"kernel margin failed for logits \[4294967296, 2, 1, 1\], labels \[4294967"
    ):
        core.margin(logits, labels, None, 255, False, None, None, None, None, 0, 0)


@pytest.mark.parametrize(
    ("architectures", "runs"),
    [
        ("90-real", [(9, 0)]),
        ("80-real", [(8, 0), (8, 6), (8, 9)]),
        ("86", [(8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]),
        *((f"100a{kind}", [(10, 0)]) for kind in ("-real", "-virtual", "")),
        ("90a-real", [(9, 0)]),
        *((f"100f{kind}", [(10, 0), (10, 3)]) for kind in ("-real", "-virtual", "")),
        ("100-virtual", [(10, 0), (10, 3), (12, 0)]),
        ("75-real 80-real 90-real 120-real 120-virtual", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]),
    ],
)
def test_which_gpus_an_architecture_serves(architectures: str, runs: list[tuple[int, int]]) -> None:
    capabilities = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert [capability for capability in capabilities if compiled_for(capability, architectures.split())] == runs


def test_why_the_native_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason is told in its turn, the second GPU's too."""
    gpus, errors = [(9, 0), (8, 6)], ["the driver is too old", ""]
    core = SimpleNamespace(check=lambda: errors.pop(0), compiler="13.0", architectures="90-real 120-virtual")

    def reason(device_type: str = "cuda") -> str | None:
        native._cuda_unavailable.cache_clear()
        return native.CPU.unavailable(device_type)

    monkeypatch.setattr(native, "cuda_core", None)
    assert "SEGADV_CUDA=ON" in str(reason())
    monkeypatch.setattr(native, "cuda_core", core)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert reason() == "its kernels are for NVIDIA GPUs"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "no GPU is visible to torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    assert reason() == "its CUDA kernels (CUDA 13.0) cannot run: the driver is too old"
    errors.append("")
    assert reason() == (
        "its CUDA kernels were compiled for 90-real, 120-virtual, not for GPU 1 of compute capability 8.6; install "
        "segadv again on this machine, or with CUDAARCHS=86"
    )
    gpus.pop()
    assert reason() is None
    assert reason("cpu") is None
    assert reason("xpu") == "this build has no kernels for xpu tensors"
    native._cuda_unavailable.cache_clear()


# --- the emulation itself -----------------------------------------------------------------------------------------


def test_emulation_finds_missing_barriers() -> None:
    program = emulated.build([emulated.ROOT / "tests" / "cuda" / "barriers.cpp"], "barriers")
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == lines[2] == "100 right with the barrier"
    assert lines[1] == "0 right without the barrier"
    assert int(lines[3].removesuffix(" right without the barrier")) < 50
    assert lines[4] == "leaves: 1 threads of block 0 ended and 0 wait for their warp, 63 wait at a barrier"
    assert lines[5] == "other_barrier: 0 threads of block 0 ended and 24 wait for their warp, 40 wait at a barrier"
    waiting = re.fullmatch("other_exchange: lanes of a warp wait at __(.*)_sync, another one at __(.*)_sync", lines[6])
    assert waiting is not None
    assert {waiting[1], waiting[2]} == {"all", "shfl_xor"}
