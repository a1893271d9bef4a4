"""What every attack has in common: its guarantees, in one place.

An attack

* computes one forward pass and one input gradient per step (`torch.autograd.grad`, never `.backward()`) and no weight
  gradients, and goes around a DistributedDataParallel wrapper, so that no collective is started;
* runs the model in eval mode and leaves every module's `training` flag, every buffer, and every parameter's
  `requires_grad` and `.grad` as they were, also when the model raises (`frozen`); a model belongs to one thread at a
  time, and if it overrides `train()`, that is not called;
* never waits for a GPU, except to check the range of the images in the first call with a model: no `.item()`, no
  boolean indexing, so that it can be captured in a CUDA graph, after a call with the same sizes, in which Triton
  compiles;
* leaves the caller's tensors alone, and returns a detached tensor of the images' dtype, device and memory
  format, inside the box and, where it has an eps, inside the ball (but for NFGSM, which projects nothing);
* may be called under `no_grad`, `inference_mode` and autocast: the model's forward runs under the caller's
  autocast, images and steps stay in full precision;
* treats each image independently: neither gradient nor step depends on the neighbours in the batch, unless the
  network's own arithmetic does (batch statistics under bn="train").
"""

from __future__ import annotations

import math
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from .. import functional
from ..checks import (
    a_module,
    a_tensor,
    checked_bounds,
    dtype_names,
    image_type,
    in_range,
    is_number,
    label_type,
    levels_to_the_caller,
    one_of,
    true_or_false,
    whole_number,
)
from ..ops.common import synchronous_checks
from .frozen import frozen, logits_of, unwrapped, uses_batch

__all__ = ["Attack", "AttackInfo", "InputGradient"]


@dataclass(kw_only=True)
class AttackInfo:
    """What an attack did to each image; every entry is [N], detached, on the images' device.

    Attributes:
        eps: in the units of the images. FastNewton: the step it computed, negative where it helps the model, 0 where
            the image was left as it is; RandomFGSM: the drawn step; CheckpointFGSM: the chosen part of its eps;
            others: their eps.
        loss: mean of the attack's loss over the image's valid pixels (balanced: over the means of its classes), where
            the last gradient was taken. None for FastNewton. (In a batch without an image all fields are empty
            tensors, none is None.)
        gain: averaged gain of the clean image, NaN where the model gave NaN. FastNewton only.
        grad_norm: L1 norm of the averaged gain's gradient with respect to the image. FastNewton only:
            eps == gain / grad_norm, before clamp_negative and max_eps.
    """

    eps: Tensor
    loss: Tensor | None = None
    gain: Tensor | None = None
    grad_norm: Tensor | None = None


class InputGradient(NamedTuple):
    """An objective and its gradient with respect to the images, from one forward and one backward pass."""

    total: Tensor
    """[N] sum of the objective over the valid pixels."""
    pixels: Tensor
    """[N] number of valid pixels, and 1 where there is none."""
    scale: Tensor
    """[N] positive factor in `grad`, which is the gradient of scale * total."""
    grad: Tensor
    """[N, ...] like the images."""
    logits: Tensor
    """Logits of the forward pass, detached."""

    @property
    def mean(self) -> Tensor:
        """[N] mean of the objective over the valid pixels; 0 where there is none."""
        return self.total / self.pixels

    @property
    def own_grad(self) -> Tensor:
        """`grad` for use after another pass, in which a model compiled to CUDA graphs writes over it."""
        return self.grad.clone()


@dataclass(kw_only=True, eq=False)
class Attack(ABC):
    """Base of the attacks: everything but the objective and the step.

    A sub-class is a dataclass whose fields are its arguments; it defines `_objective` and `_perturb`.

    Args:
        model: nn.Module from images to logits (or to what `model_logits` understands), in any mode, also
            compiled or wrapped in DistributedDataParallel. Logits may be of another size than the labels: the
            loss includes the resampling.
        ignore_index: label of the pixels that do not count.
        align_corners: of that resampling.
        bounds: lowest and highest pixel value; the result is clipped to it. eps and alpha are in its units.
        bn: "eval": norm layers use their running statistics. "train": those that are in train mode use the
            batch's own, through which its images influence each other: the gradient is that of the sum of all images'
            mean losses. Running statistics are not updated; dropout is off in both.
        output: callable from what the model returns to the logits.

    Raises:
        TypeError: an argument of the wrong type; in the call, a model output that is not understood.
        ValueError: an argument out of its range, such as an eps in units of 0..255; in the call, half
            precision images, tensors that do not fit together, logits that let no gradient pass; bad labels and images
            clearly outside `bounds`, on a GPU only under SEGADV_CHECK=1, which waits for it (such images also in the
            first call with a model). Refused are also reentrant checkpointing, FullyShardedDataParallel
            (fully_shard is supported) and torch.func transforms around the attack (inside the model they are
            supported).
    """

    model: nn.Module = field(kw_only=False, repr=False)
    ignore_index: int = 255
    align_corners: bool = False
    bounds: tuple[float, float] = (0.0, 1.0)
    bn: Literal["eval", "train"] = "eval"
    output: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        self._check_arguments()

    def _check_arguments(self) -> None:
        """In every call, too: they may have been changed since."""
        a_module(self.model)
        if self.output is not None and not callable(self.output):
            raise TypeError(f"output must be a callable or None, got a {type(self.output).__name__}")
        true_or_false(**{entry.name: getattr(self, entry.name) for entry in fields(self) if entry.type == "bool"})
        one_of(("eval", "train"), bn=self.bn)
        whole_number(ignore_index=self.ignore_index)
        self.ignore_index = int(self.ignore_index)
        self.bounds = low, high = checked_bounds(self.bounds)
        if math.isinf(low) or math.isinf(high):
            raise ValueError(f"bounds must be finite in an attack, got {self.bounds}")

    @abstractmethod
    def _objective(
        self, logits: Tensor, labels: Tensor, *, step: int = 0, steps: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum over valid pixels [N], their number [N], gradient of the sum, free to be written to."""

    @abstractmethod
    def _perturb(self, images: Tensor, labels: Tensor) -> tuple[Tensor, AttackInfo]:
        """The attack itself, on a frozen model, without grad mode; must not write to its arguments."""

    @overload
    def __call__(self, images: Tensor, labels: Tensor, *, return_info: Literal[False] = False) -> Tensor: ...
    @overload
    def __call__(self, images: Tensor, labels: Tensor, *, return_info: Literal[True]) -> tuple[Tensor, AttackInfo]: ...
    @overload
    def __call__(self, images: Tensor, labels: Tensor, *, return_info: bool) -> Tensor | tuple[Tensor, AttackInfo]: ...
    def __call__(
        self, images: Tensor, labels: Tensor, *, return_info: bool = False
    ) -> Tensor | tuple[Tensor, AttackInfo]:
        """Adversarial images.

        Args:
            images: [N, ...], usually [N, 3, H, W], float32 or float64, inside `bounds`.
            labels: [N, H, W] (or [N] for logits [N, C]), int64, int32, int16 or uint8.
            return_info: also return an `AttackInfo`.

        Returns:
            like the images, detached; with return_info the pair of it and the info.
        """
        with self._isolated(images, labels) as (own_images, own_labels):
            if images.shape[0] == 0:
                empty = images.new_zeros(0)
                adversarial = torch.zeros_like(images)
                info = AttackInfo(eps=empty, loss=empty, gain=empty, grad_norm=empty)
            else:
                adversarial, info = self._perturb(own_images, own_labels)
        return (adversarial, info) if return_info else adversarial

    def input_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Gradient with respect to the images, like them, as the attack's first step uses it, but at the images
        themselves where the attack has a random start.

        It is the gradient of the mean over the image's valid pixels, times a positive factor near the root of their
        number (with bn="train" one for all images), which leaves its sign: FGSM at many eps costs one gradient and,
        for each eps, `functional.sign_step(images, gradient, eps, bounds=...)`. A targeted attack's gradient is
        that of -loss, as sign attacks ascend; FastNewton's is that of the gain. Arguments as in the call.
        """
        with self._isolated(images, labels) as (own_images, own_labels):
            if images.shape[0] == 0:
                return torch.zeros_like(images)
            return self._differentiate(own_images, own_labels).own_grad

    @property
    def arguments(self) -> dict[str, Any]:
        """The attack's name and its arguments without the model, fit for JSON."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "model"}
        return {"attack": type(self).__name__, **{name: _plain(value) for name, value in values.items()}}

    @contextmanager
    def _isolated(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Checks the inputs, freezes the model and gives the inputs as tensors that autograd accepts."""
        self._check_inputs(images, labels)
        device_type = images.device.type
        # Without autocast's cache: it would keep copies of all steps' images until the caller's block ends.
        autocast = torch.autocast(
            device_type,
            dtype=torch.get_autocast_dtype(device_type),
            enabled=torch.is_autocast_enabled(device_type),
            cache_enabled=False,
        )
        with torch.inference_mode(False), torch.no_grad(), autocast, frozen(self.model, bn=self.bn):
            # A tensor made under inference_mode cannot take part in autograd, its clone made here can.
            own_images, own_labels = (t.clone() if t.is_inference() else t.detach() for t in (images, labels))
            yield own_images, own_labels

    def _check_inputs(self, images: Tensor, labels: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self._check_arguments()
        for name, tensor in (("images", images), ("labels", labels)):
            a_tensor(name, tensor)
            if not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(tensor):
                raise ValueError(
                    f"{name} must be a plain tensor, got one inside of a torch.func transform (grad, vmap, jvp); an "
                    "attack takes gradients by itself and cannot be transformed. Call it outside of the transform"
                )
        image_type(images)
        check_sizes(images, labels)
        label_type(labels)
        if labels.device != images.device:
            raise ValueError(f"labels must be on the images' device, {images.device}, got {labels.device}")
        if self.bn == "train" and images.shape[0] == 1 and any(map(uses_batch, unwrapped(self.model).modules())):
            warnings.warn(
                'bn should be "eval" with a batch of one image, got "train": norm layers take its own statistics '
                '(a layer with one value per channel cannot even do that); use bn="eval", or more images',
                stacklevel=levels_to_the_caller(),
            )
        if _looks_at(images, self.model):
            in_range(images, "images", self.bounds)
            _SEEN.add(self.model)

    def _logits(self, images: Tensor) -> Tensor:
        """The model's forward pass, in the caller's autocast state."""
        logits = logits_of(self.model, images, self.output)
        if not logits.is_floating_point() or logits.dim() < 2 or logits.shape[0] != images.shape[0]:
            gave = "model" if self.output is None else "output"
            raise ValueError(
                f"{gave}: it returned {dtype_names(logits.dtype)} {list(logits.shape)} for images "
                f"{list(images.shape)}; floating point logits [N, C, h, w] or [N, C] are needed"
            )
        return logits

    def _differentiate(self, images: Tensor, labels: Tensor, *, step: int = 0, steps: int = 1) -> InputGradient:
        """One forward, one pass over the logits for value and gradient, one backward to the images."""
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits(leaf)
        if not logits.requires_grad:
            raise ValueError(_NO_GRADIENT)
        # The backward of what ran under autocast belongs outside of it.
        with torch.autocast(images.device.type, enabled=False):
            values = logits.detach()
            # A logit whose pixels are so many that float16 could not hold their sum: with align_corners the middle one
            # of 3 x 3 has 2.25 times the mean.
            if values.dtype is torch.float16 and labels.numel() * values.shape[1] > 2**14 * values.numel():
                values = values.float()
            total, n_valid, logits_grad = self._objective(values, labels, step=step, steps=steps)
            pixels = n_valid.clamp(min=1)
            # Half precision holds neither the gradient of a mean over half a million pixels nor, inside the
            # network, that of the sum. In the logits' dtype: total and gradient get the same factor.
            count = pixels.to(total.dtype)
            scale = torch.exp2(torch.round(-0.5 * torch.log2(count)))
            if self.bn == "train":  # an image's gradient has a part of the others' objectives: the means count alike
                scale = scale.amin().reciprocal() / count
            scale = scale.to(logits.dtype)
            logits_grad = logits_grad.mul_(per_image(scale, logits_grad)).to(logits.dtype)
            try:
                (grad,) = torch.autograd.grad(logits, leaf, logits_grad, allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant=True" in str(error):
                    raise ValueError(_REENTRANT) from error
                raise
        if grad is None:
            raise ValueError(_NO_GRADIENT)
        return InputGradient(total, pixels, scale.to(total.dtype), grad, logits.detach())


_SEEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that got images in their range."""


def _looks_at(images: Tensor, model: nn.Module) -> bool:
    """Whether the range of the images is looked at: on a CPU always; on a GPU, which has to be waited for, in the first
    call with a model, and always under SEGADV_CHECK=1; not where nothing can wait, or is being looked for that does."""
    if torch.compiler.is_compiling():
        return False
    if images.device.type == "cpu" or synchronous_checks():
        return True
    if images.device.type != "cuda" or model in _SEEN:
        return False
    return not torch.cuda.is_current_stream_capturing() and torch.cuda.get_sync_debug_mode() == 0


_NO_GRADIENT = (
    "model: no gradient passes from its logits to the images. Does it run under torch.no_grad or "
    "torch.inference_mode, detach, or return predictions instead of logits? Remove that, or name the "
    "logits with output="
)


_REENTRANT = (
    "model: it uses reentrant checkpointing, which allows no gradient of the images; give "
    "torch.utils.checkpoint use_reentrant=False (in Hugging Face models "
    'gradient_checkpointing_enable({"use_reentrant": False}))'
)


def check_sizes(images: Tensor, labels: Tensor) -> None:
    """ValueError where images [N, ..., H, W] and labels [N, H, W], or [N], are of different sizes."""
    if images.dim() == 4 and labels.dim() == 4 and labels.shape[1] == 1:
        raise ValueError(f"labels must be [N, H, W], got {list(labels.shape)}; labels.squeeze(1) converts")
    if images.dim() == 4 and labels.dim() == 3 and labels.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"labels must have the same N, H and W as images {list(images.shape)}, got {list(labels.shape)}. "
            "Resize the labels (nearest neighbour) or the images"
        )
    if labels.dim() < 1 or labels.shape[:1] != images.shape[:1]:
        raise ValueError(
            f"labels must be [N, H, W] or [N] with the same N as images {list(images.shape)}, got {list(labels.shape)}"
        )


def has_label(labels: Tensor, ignore_index: int) -> Tensor:
    """bool [N]: the images with a valid pixel."""
    kind = torch.iinfo(labels.dtype)
    if not kind.min <= ignore_index <= kind.max:  # a comparison would take it modulo 256
        return labels.new_ones(len(labels), dtype=torch.bool)
    valid = labels != ignore_index
    return valid.flatten(1).any(1) if valid.dim() > 1 else valid


def has_no_loss(logits: Tensor, labels: Tensor, *, ignore_index: int, align_corners: bool) -> Tensor:
    """bool [N]: the images whose cross-entropy is NaN."""
    # of finite logits, far fewer than pixels, none is; a GPU is not waited for
    if logits.device.type == "cpu" and logits.isfinite().all():
        return logits.new_zeros(len(logits), dtype=torch.bool)
    return functional.cross_entropy(
        logits, labels, reduction="image", ignore_index=ignore_index, align_corners=align_corners
    ).isnan()


def per_image(value: Tensor, like: Tensor) -> Tensor:
    """value [N] as [N, 1, ...], to be broadcast over `like`."""
    return value.view(-1, *[1] * (like.dim() - 1))


def checked_size(
    name: str, value: float | Tensor | None, bounds: tuple[float, float], *, default: float = 0.0
) -> float | Tensor:
    """An eps or alpha as a float, None as `default` times the width of the bounds, a tensor [N] as it is; one on a GPU
    is looked at under SEGADV_CHECK=1 only."""
    width = bounds[1] - bounds[0]
    if value is None:
        return default * width
    if isinstance(value, Tensor):
        look = value.numel() and (value.device.type == "cpu" or synchronous_checks())
        outside = value[~((value >= 0) & (value <= width))].tolist() if look else []
    else:
        if not is_number(value):
            raise TypeError(f"{name} must be a number, or a tensor [N], got a {type(value).__name__}")
        outside = [] if 0 <= value <= width else [value]
    if outside:
        raise ValueError(
            f"{name} must be in [0, {width:g}], the width of bounds = {tuple(bounds)}, got {outside[0]}. "
            f"{name} is in the units of the images: 8/255 for images in [0, 1], not 8"
        )
    return value if isinstance(value, Tensor) else float(value)


def is_plain(value: Any) -> bool:
    """Whether `Attack.arguments` holds it as it is; of anything else, a callable say, only the name."""
    return isinstance(value, (bool, int, float, str, tuple, Tensor)) or value is None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if is_plain(value):
        return value
    return getattr(value, "__name__", type(value).__name__)
