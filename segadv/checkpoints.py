"""Files of a training run: written whole or not at all, read without executing code.

``last.pt`` is what a run continues from: tensors and plain values, read with ``weights_only=True``.
``model.safetensors`` is what one shares: the weights, with the run's config as text beside them.
"""

from __future__ import annotations

import errno
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.serialization import config as serialization

from .attacks.frozen import is_expanded, unwrapped
from .writing import atomic_write, write_text

__all__ = [
    "check_weights",
    "drop_lines_after",
    "load_model",
    "load_weights",
    "read_checkpoint",
    "read_config",
    "share",
    "whole_lines",
    "write_checkpoint",
]


def drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines {"step": ...} of a file up to `step`: those after the checkpoint will be written again."""
    if not path.exists():
        return
    kept = "".join(f"{json.dumps(line)}\n" for line in whole_lines(path) if line["step"] <= step)
    if kept != path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, kept, of_run=True)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines {"step": ...} of a file up to one that a kill cut short."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            content = json.loads(line)
        except ValueError:
            break
        if not isinstance(content, dict) or not isinstance(content.get("step"), int):
            break
        found.append(content)
    return found


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``last.pt`` or a ``.safetensors`` file holds: at least config, model and steps_done, on the CPU.

    Raises:
        ValueError: it cannot be read, or holds something else.
        FileNotFoundError: there is no such file.
        OSError: the file may not be read, or the disk fails.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"checkpoint {os.fspath(path)!r} does not exist")
    if Path(path).is_dir():
        raise ValueError(f"checkpoint {os.fspath(path)!r} is a folder: give its last.pt or model.safetensors")
    cause: Exception | None = None
    try:
        shared = Path(path).suffix == ".safetensors"
        state = _read_shared(path) if shared else _read_last(path)
        if isinstance(state, dict) and {"config", "model", "steps_done"} <= state.keys():
            return state
        problem = "it holds something else; evaluate a model of your own in Python, with segadv.evaluation.evaluate"
    except MemoryError:  # the file may well be whole, here and below
        raise
    except Exception as error:  # whatever a damaged file makes the unpickler raise; its advice would mislead
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a damaged file names odd positions
            raise OSError(error.errno or errno.EIO, f"{path} cannot be read: {error.strerror or error}") from error
        told = f": {error}" if isinstance(error, zipfile.BadZipFile) else ""
        problem, cause = f"it is damaged or something else ({type(error).__name__}{told})", error
    raise ValueError(
        f"{path} cannot be read as a checkpoint of segadv (last.pt or model.safetensors): {problem}"
    ) from cause


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replaces ``last.pt`` by tensors and plain values. Raises an OSError that says what to do."""
    with atomic_write(path, durable=True, of_run=True) as temporary, open(temporary, "wb") as file:
        try:
            # `_read_last` looks at them
            with serialization.patch("save.compute_crc32", True):  # type: ignore[attr-defined]
                torch.save(state, file)
        except RuntimeError as error:  # raised on closing the archive, it hides that a write failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def _read_last(path: str | os.PathLike[str]) -> Any:
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # torch.load does not look at the checksums
            raise zipfile.BadZipFile(f"{damaged} does not have its checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_shared(path: str | os.PathLike[str]) -> dict[str, Any]:
    with safe_open(os.fspath(path), framework="pt") as file:
        values = json.loads((file.metadata() or {})["segadv"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = values["config"] | {"description": values["description"]}
    return {"config": config, "steps_done": values["steps"], "model": weights}


def share(path: Path, model: nn.Module, config: Mapping[str, Any], steps: int) -> None:
    """Writes the weights as safetensors; in its metadata "segadv" is a JSON text of arm, steps, description, config.

    One entry, because of several the format takes the order by chance: equal weights and runs give equal files.
    """
    entries = dict(config)
    values = {"arm": entries.get("arm"), "steps": steps, "description": entries.pop("description", {})}
    metadata = {"segadv": json.dumps(values | {"config": entries})}
    # copies: the format takes no two tensors in one memory
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    with atomic_write(path, durable=True, of_run=True) as temporary:
        # save_file would make a file that others cannot read
        temporary.write_bytes(save(weights, metadata=metadata))


def load_model(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Puts the weights of ``last.pt`` or ``model.safetensors`` into a model of the same architecture; returns it.

    A compiled model, or one wrapped in DistributedDataParallel, takes them as the model inside of it would.

    Raises:
        ValueError: the file belongs to another architecture, or cannot be read; the model is unchanged then.
        FileNotFoundError: there is no such file.
    """
    inner = unwrapped(model)
    load_weights(getattr(inner, "_orig_mod", inner), read_checkpoint(path)["model"], path)
    return model


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``last.pt`` or ``model.safetensors`` was trained with. Raises as `load_model`.

    The fields of `segadv.training.TrainConfig`, as JSON knows them (lists for tuples), and beside them
    "dataset_length", "processes" and "description".
    """
    config: dict[str, Any] = read_checkpoint(path)["config"]
    return config


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """`load_state_dict` that changes nothing where anything does not fit; `path` is named in its ValueError."""
    check_weights(model, weights, path)  # before anything is copied: load_state_dict raises with the half of it done
    model.load_state_dict(weights)


def require_loadable(model: nn.Module) -> None:
    """ValueError where `load_state_dict` would raise, with a part of the weights already changed."""
    if expanded := [name for name, value in model.state_dict().items() if is_expanded(value)]:
        raise ValueError(
            f"model must hold no expanded tensors in its state_dict(), got {expanded[:3]}: nothing can be loaded into "
            "them; .clone() gives such a tensor memory of its own"
        )


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """ValueError where they are not those of such a model."""
    require_loadable(model)
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: list(value.shape) for name, value in weights.items()}
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        shown = "; ".join(
            f"{name} has shape {theirs.get(name, 'none')} there and {ours.get(name, 'none')} in the model"
            for name in differing[:3]
        )
        raise ValueError(
            f"{path} belongs to another architecture: {len(differing)} of {len(ours | theirs)} tensors differ: {shown}"
        )
