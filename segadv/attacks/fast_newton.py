"""The Fast Newton method (Wiens & Hammer 2022, doi 10.5220/0010788400003122)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, overload

from torch import Tensor, nn

from .. import functional
from .base import Attack, AttackInfo, checked_size

__all__ = ["FastNewton", "fast_newton_step"]


@dataclass(kw_only=True, eq=False)
class FastNewton(Attack):
    """One Newton step on the averaged gain gbar: the smallest step in the max-norm to where its linearisation is 0.

    eps_n = gbar_n / ||grad gbar_n||_1 (eq. 18); clip(x - eps_n * sign(grad gbar_n)) (eq. 19). Every image
    gets its own eps; there is none to choose.

    An image stays as it is if none of its pixels is valid, if its gradient vanishes, or if gain or gradient is not
    finite (overflow in float16; bfloat16 is the better choice).

    Args, besides those of `Attack`:
        clamp_negative: eps = max(0, eps). The equation as it stands gives eps < 0 where the averaged gain is
            negative, and the step then helps the model.
        max_eps: caps |eps|; a float. The paper has no cap.

    `AttackInfo`: eps, gain and grad_norm, those of gbar.
    """

    clamp_negative: bool = False
    max_eps: float | None = None

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if isinstance(self.max_eps, Tensor):
            raise TypeError("max_eps must be a number or None, got a Tensor")
        if self.max_eps is not None:
            self.max_eps = float(checked_size("max_eps", self.max_eps, self.bounds))

    def _objective(
        self, logits: Tensor, labels: Tensor, *, step: int = 0, steps: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        return functional.gain_and_grad(
            logits, labels, ignore_index=self.ignore_index, align_corners=self.align_corners
        )

    def _perturb(self, images: Tensor, labels: Tensor) -> tuple[Tensor, AttackInfo]:
        gain = self._differentiate(images, labels)
        adversarial, eps, norm = functional._newton_step(
            images,
            gain.grad,
            gain.scale * gain.total,
            bounds=self.bounds,
            clamp_negative=self.clamp_negative,
            max_eps=self.max_eps,
        )
        return adversarial, AttackInfo(eps=eps, gain=gain.mean, grad_norm=norm / (gain.scale * gain.pixels))


class _Options(TypedDict, total=False):
    """The arguments of `FastNewton`."""

    ignore_index: int
    align_corners: bool
    bounds: tuple[float, float]
    clamp_negative: bool
    max_eps: float | None
    bn: Literal["eval", "train"]
    output: Callable[[Any], Tensor] | None


@overload
def fast_newton_step(
    model: nn.Module, images: Tensor, labels: Tensor, *, return_info: Literal[False] = ..., **options: Unpack[_Options]
) -> Tensor: ...
@overload
def fast_newton_step(
    model: nn.Module, images: Tensor, labels: Tensor, *, return_info: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, AttackInfo]: ...
@overload
def fast_newton_step(
    model: nn.Module, images: Tensor, labels: Tensor, *, return_info: bool, **options: Unpack[_Options]
) -> Tensor | tuple[Tensor, AttackInfo]: ...
def fast_newton_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    align_corners: bool = False,
    bounds: tuple[float, float] = (0.0, 1.0),
    clamp_negative: bool = False,
    max_eps: float | None = None,
    bn: Literal["eval", "train"] = "eval",
    output: Callable[[Any], Tensor] | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, AttackInfo]:
    """Fast Newton adversarial images of a batch: `FastNewton(model, ...)(images, labels)` in one call.

    x* = clip(x - eps * sign(grad gbar)), eps = gbar / ||grad gbar||_1, with gbar the image's averaged gain.

    Source: Wiens & Hammer 2022 (doi 10.5220/0010788400003122), eqs. 18 and 19.

    Args:
        model: nn.Module from images to logits [N, C, h, w] of any size (or [N, C]). It may be in train mode,
            compiled, or wrapped in DistributedDataParallel, and is afterwards exactly as before.
        images: [N, 3, H, W], float32 or float64, inside `bounds`.
        labels: [N, H, W] (or [N]), int64, int32, int16 or uint8.
        return_info: also return an `AttackInfo` with eps, gain and grad_norm, each [N].

    The other arguments, and the errors, are those of `FastNewton` and `Attack`.

    Returns:
        like the images, detached; with return_info the pair of it and the info.

    Equivalent to, for a model in eval mode (but for the special cases of `functional.newton_step`)::

        x = images.clone().requires_grad_()
        gain = functional.averaged_gain(model(x), labels)
        (grad,) = torch.autograd.grad(gain.sum(), x)
        eps = gain / grad.abs().flatten(1).sum(1)
        (x - eps.view(-1, 1, 1, 1) * grad.sign()).clamp(*bounds).detach()
    """
    attack = FastNewton(
        model,
        ignore_index=ignore_index,
        align_corners=align_corners,
        bounds=bounds,
        clamp_negative=clamp_negative,
        max_eps=max_eps,
        bn=bn,
        output=output,
    )
    return attack(images, labels, return_info=return_info)
