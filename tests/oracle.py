"""Independent references: plain PyTorch under autograd, written from the equations, in whatever dtype comes in.

With float64 inputs they are the truth; with the tested dtype they are "eager", whose error is the yardstick.
Nothing here is imported from segadv.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def upsample(logits: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


class Resampled(nn.Module):
    """A network with its logits at the images' size, as align_corners=True resamples them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return upsample(self.network(images), images.shape[-2:], align_corners=True)


class Offloaded(nn.Module):
    """A model whose weights are here for the time of a pass only, as Accelerate's hooks do it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        self.model = model.to("meta")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(self.model, self.weights, (images,))
        return logits


def split(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(class index with 0 at ignored pixels, valid)."""
    valid = labels.long() != ignore_index
    return torch.where(valid, labels.long(), 0), valid


def pixel_margin(logits: Tensor, labels: Tensor, ignore_index: int = 255, align_corners: bool = False) -> Tensor:
    z = upsample(logits, labels.shape[-2:], align_corners)
    y, valid = split(labels, ignore_index)
    is_label = F.one_hot(y, z.shape[1]).movedim(-1, 1).bool()
    own = torch.where(is_label, z, 0).sum(1)
    # argmax, so that the gradient of a tie goes to the lowest class alone
    runner_up = torch.where(is_label, -torch.inf, z.detach()).argmax(1, keepdim=True)
    return torch.where(valid, own - z.gather(1, runner_up).squeeze(1), 0)


def mean_over_valid(values: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    n_valid = (labels.long() != ignore_index).sum((1, 2))
    return values.sum((1, 2)) / n_valid.clamp(min=1)


def cross_entropy_map(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    z = upsample(logits, labels.shape[-2:], align_corners)
    y, valid = split(labels, ignore_index)
    y = torch.where(valid, y, -100)
    return F.cross_entropy(z, y, weight=weight, ignore_index=-100, reduction="none")


def segpgd_map(
    logits: Tensor,
    labels: Tensor,
    lam: float,
    targeted: bool = False,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    z = upsample(logits, labels.shape[-2:], align_corners)
    correct = z.argmax(1) == labels.long()
    high, low = (lam, 1 - lam) if targeted else (1 - lam, lam)
    factor = torch.where(correct, torch.full_like(z[:, 0], high), torch.full_like(z[:, 0], low))
    return factor.detach() * cross_entropy_map(logits, labels, None, ignore_index, align_corners)


def cospgd_map(
    logits: Tensor,
    labels: Tensor,
    targeted: bool = False,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    z = upsample(logits, labels.shape[-2:], align_corners)
    y, _ = split(labels, ignore_index)
    onehot = F.one_hot(y, z.shape[1]).movedim(-1, 1).to(z.dtype)
    cosine = F.cosine_similarity(z.softmax(1), onehot, dim=1).detach()
    factor = 1 - cosine if targeted else cosine
    return factor * cross_entropy_map(logits, labels, None, ignore_index, align_corners)


def confusion(logits: Tensor, labels: Tensor, ignore_index: int = 255, align_corners: bool = False) -> Tensor:
    prediction = upsample(logits.double(), labels.shape[-2:], align_corners).argmax(1)
    # on the CPU: a GPU would be sent several kernels for every pixel
    matrix = torch.zeros(logits.shape[0], logits.shape[1], logits.shape[1], dtype=torch.int64, device="cpu")
    for n in range(labels.shape[0]):
        for label, predicted in zip(labels[n].flatten().tolist(), prediction[n].flatten().tolist(), strict=True):
            if label != ignore_index:
                matrix[n, label, predicted] += 1
    return matrix.to(labels.device)


# --- cases ------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    logits: Tensor
    labels: Tensor
    ignore_index: int
    align_corners: bool
    left_out: int  # pixels set to ignored because a rounding difference could flip a tie

    @property
    def options(self) -> dict[str, int | bool]:
        return {"ignore_index": self.ignore_index, "align_corners": self.align_corners}


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values, laid out otherwise."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = tensor.new_full([*tensor.shape[:-1], 2 * tensor.shape[-1] + 3], float("nan"))
        view = wide[..., 2:-1:2]
        view.copy_(tensor)
        return view
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    return tensor


def shifted(tensor: Tensor) -> Tensor:
    """The same values, dense, but not at a multiple of 16 bytes: a GPU refuses wide loads and stores there."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


def leave_out_ties(case: Case) -> Case:
    z = upsample(case.logits.double(), case.labels.shape[-2:], case.align_corners)
    two = z.topk(2, dim=1).values
    scale = case.logits.double().abs().max() if case.logits.numel() else 0.0
    labels = case.labels.long()
    others = z.scatter(1, torch.where(labels == case.ignore_index, 0, labels).unsqueeze(1), -torch.inf)
    runners = others.topk(min(2, z.shape[1]), dim=1).values
    near = (two[:, 0] - two[:, 1] < 1e-5 * scale) | (runners[:, 0] - runners[:, -1] < 1e-5 * scale)
    if z.shape[1] == 2:
        near = two[:, 0] - two[:, 1] < 1e-5 * scale
    near &= labels != case.ignore_index
    case.left_out = int(near.sum())
    case.labels = torch.where(near, case.ignore_index, labels).to(case.labels.dtype)
    return case


def random_case(seed: int, dtype: torch.dtype, *, largest: int = 40, full_resolution: bool | None = None) -> Case:
    """Odd sizes up to `largest`, all label types, both align_corners, layouts, void borders; ties left out.

    The numbers are those of the CPU's generator, on whatever device.
    """
    g = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g, device="cpu"))

    n, c = integer(1, 3), (2, 3, 5, 19, 21, 151)[integer(0, 5)]
    size = (integer(1, largest), integer(1, largest))
    own = (
        size
        if (full_resolution if full_resolution is not None else integer(0, 2) == 0)
        else (integer(1, largest), integer(1, largest))
    )
    logits = (torch.randn(n, c, *own, generator=g, dtype=torch.float64, device="cpu") * integer(1, 6)).to(dtype)
    label_dtype = LABEL_DTYPES[integer(0, 3)]
    ignore_index = (255, 0, 1, 255)[integer(0, 3)]
    labels = torch.randint(0, c, (n, *size), generator=g, device="cpu")
    border = integer(0, 3)
    if border:
        labels[:, :border] = ignore_index
        labels[:, :, -border:] = ignore_index
    layout = ("contiguous", "channels_last", "sliced", "transposed")[integer(0, 3)]
    device = torch.get_default_device()
    logits, labels = in_layout(logits.to(device), layout), labels.to(device)
    return leave_out_ties(Case(logits, labels.to(label_dtype), ignore_index, bool(integer(0, 1)), 0))


# Own size, labels' size, align_corners, dtype, by seed: small ones first, which suffice slow backends; then several
# tiles, bands and blocks of the CPU's walk, and what is left of each; many and no pixels between two logits.
SMOOTH: list[tuple[tuple[int, int], tuple[int, int], bool, torch.dtype]] = [
    ((2, 3), (16, 24), False, torch.float32),
    ((3, 2), (12, 19), True, torch.float64),
    ((3, 5), (7, 11), False, torch.float32),
    ((2, 2), (8, 8), True, torch.float32),
    *(
        (own, size, align_corners, dtype)
        for own, size in (((5, 33), (40, 264)), ((2, 40), (41, 300)), ((6, 9), (24, 150)), ((7, 150), (9, 140)))
        for align_corners in (False, True)
        for dtype in (torch.float32, torch.float64)
    ),
    ((9, 1), (99, 6), False, torch.float32),
]


def smooth_case(seed: int) -> Case:
    """As of a trained network: smooth logits, of which few classes compete anywhere, and labels in regions.

    Most labels are the class of the largest logit, some any class. `seed`: of `SMOOTH`.
    """
    own, size, align_corners, dtype = SMOOTH[seed]
    classes, g = 19, torch.Generator().manual_seed(seed)
    field = 4 * torch.randn(2, classes, 3, 3, generator=g, dtype=torch.float64, device="cpu")
    noise = 0.2 * torch.randn(2, classes, *own, generator=g, dtype=torch.float64, device="cpu")
    labels = upsample(field, size).argmax(1)
    other = torch.rand(labels.shape, generator=g, device="cpu") < 0.1
    labels[other] = torch.randint(0, classes, (int(other.sum()),), generator=g, device="cpu")
    labels[:, :1] = 255
    device = torch.get_default_device()
    logits = (upsample(field, own) + noise).to(dtype)
    return leave_out_ties(Case(logits.to(device), labels.to(device), 255, align_corners, 0))


# --- comparing --------------------------------------------------------------------------------------------------


def assert_accurate(
    ours: Tensor, eager: Tensor, truth: Tensor, what: str = "", *, addends: Tensor | None = None
) -> None:
    """max error of ours <= 1.5 x max error of eager in the same dtype + 4 ulp of the largest value; fp64: 1e-12.

    For a sum of signed values, which cancel, the largest value is that of the sum of their magnitudes: `addends`,
    of truth's shape. Otherwise a handful of sums that happen to be near 0 would be compared by luck.
    Non-finite values must stand at the same places.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    ours64, eager64 = ours.detach().double(), eager.detach().double()
    truth = truth.detach()
    finite = truth.isfinite()
    assert torch.equal(ours64.isfinite(), finite), f"{what}: non-finite values at other places"
    largest = torch.where(finite, truth if addends is None else addends.detach(), 0).abs().max()
    error = torch.where(finite, ours64 - truth, 0).abs().max()
    if ours.dtype is torch.float64:
        allowed = 1e-12 * max(float(largest), 1e-300)
    else:
        eager_error = torch.where(finite, eager64 - truth, 0).abs().max()
        allowed = 1.5 * float(eager_error) + 4 * torch.finfo(ours.dtype).eps * float(largest)
    assert float(error) <= allowed, f"{what}: error {float(error):.3e} > allowed {allowed:.3e} (largest {largest:.3e})"


def assert_same_direction(ours: Tensor, eager: Tensor, truth: Tensor, what: str = "") -> None:
    """Gradients as vectors: relative L2 and 1 - cosine within 1.5 x eager's relative L2 + 4 ulp (fp64: 1e-12)."""
    a, b = ours.detach().double().flatten(), truth.detach().flatten()
    if b.norm() == 0:
        assert a.norm() == 0, f"{what}: gradient where there is none"
        return
    allowed = 1e-12
    if ours.dtype is not torch.float64:
        eager_error = (eager.detach().double().flatten() - b).norm() / b.norm()
        allowed = 1.5 * float(eager_error) + 4 * torch.finfo(ours.dtype).eps
    assert (a - b).norm() / b.norm() <= allowed, f"{what}: relative L2 {(a - b).norm() / b.norm():.3e} > {allowed:.3e}"
    assert 1 - F.cosine_similarity(a, b, dim=0) <= allowed, f"{what}: cosine"
