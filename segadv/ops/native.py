"""The native backend: tensors become pointers, sizes and strides for the compiled core `_segadv_native`."""

from __future__ import annotations


def unavailable(device_type: str) -> str | None:
    return "not built yet"


def build_info() -> dict[str, object]:
    return {}
