"""Adversarial attacks on segmentation and classification models. `base` says what all of them guarantee."""

from __future__ import annotations

from .base import Attack, AttackInfo
from .fast_newton import FastNewton, fast_newton_step
from .sign_attacks import BIM, FGSM, NFGSM, PGD, CheckpointFGSM, CosPGD, RandomFGSM, SegPGD

__all__ = [
    "BIM",
    "FGSM",
    "NFGSM",
    "PGD",
    "Attack",
    "AttackInfo",
    "CheckpointFGSM",
    "CosPGD",
    "FastNewton",
    "RandomFGSM",
    "SegPGD",
    "fast_newton_step",
]
