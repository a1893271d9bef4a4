"""The folder of a training run: what lies in it, and who wrote it where and with what."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch

from .checkpoints import drop_lines_after, whole_lines
from .ops.native import build_info
from .records import versions
from .results import read_rows
from .writing import explained, remove_leftovers, write_text

__all__ = ["RunDirectory", "environment", "git_commit"]


class RunDirectory:
    """Paths and files of a run; only the first process may write, and no other run.

    ``run.json``: the run's config and description, and "starts", one entry for every time it was started or
    continued: time, steps_done, command, processes, what is different in its config, git_commit of the working
    directory, environment.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "last.pt"
        self.model = self.path / "model.safetensors"
        self.metrics = self.path / "metrics.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.curves = self.path / "curves.csv"
        self.run = self.path / "run.json"
        self.pictures = (self.path / "training.png", self.path / "robustness.png")
        self._written = (self.model, self.metrics, self.validation, self.curves, *self.pictures)
        self._lock: IO[str] | None = None

    def prepare(self) -> bool:
        """Makes the folder, keeps other runs out of it until `close`, and removes what a killed run left half
        written. Returns whether there is a checkpoint.

        Raises:
            ValueError: another process is training there, or files of a run's names are no run's.
        """
        with explained(self.path, of_run=True):
            self.path.mkdir(parents=True, exist_ok=True)
            is_a_run = self.checkpoint.exists() or bool(self._previous())
            foreign = [path.name for path in (*self._written, self.run) if path.exists()]
        if foreign and not is_a_run:
            raise ValueError(
                f"{self.path} holds {', '.join(foreign)}, but neither {self.checkpoint.name} nor a run's "
                f"{self.run.name}: no training run left it, and this one would overwrite it; give another folder"
            )
        self._keep_others_out()
        with explained(self.path, of_run=True):
            remove_leftovers(self.path)
        return self.checkpoint.exists()

    def _keep_others_out(self) -> None:
        """Two runs in one folder would overwrite each other's files, without a word.

        The system gives the lock back when the process ends, however that comes about; a worker process that outlives
        it does not hold it, as it would hold one of flock.
        """
        path = self.path / ".lock"
        with explained(path, of_run=True):
            lock = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            who = lock.read().strip() or "another process"
            lock.close()
            raise ValueError(
                f"{self.path}: {who} is training there, and two runs in one folder would overwrite each other; wait, "
                "or give another folder"
            ) from error
        except OSError:  # a file system without locks
            lock.close()
            return
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        self._lock = lock

    def close(self) -> None:
        """Lets other runs in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def drop_after(self, steps_done: int) -> None:
        """Removes the lines of what was written after the checkpoint, also one that a kill cut short."""
        for path in (self.metrics, self.validation):
            drop_lines_after(path, steps_done)

    def start(self, config: Mapping[str, Any], steps_done: int, device: torch.device) -> None:
        """Adds this start to run.json."""
        if steps_done == 0 and self.run.exists():  # a run that is started anew
            self.clear()
        self.model.unlink(missing_ok=True)  # of another run, or of this one when it had an end before
        config = dict(config)
        content = {"config": config, "description": config.pop("description"), "starts": []} | self._previous()
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "steps_done": steps_done,
            "command": shlex.join(sys.orig_argv),
            "different": {name: value for name, value in config.items() if content["config"].get(name) != value},
            "git_commit": git_commit(),
            "environment": environment(device),
        }
        content["starts"].append(start)
        write_text(self.run, json.dumps(content, indent=1) + "\n", of_run=True)

    def is_of_another(self, config: Mapping[str, Any]) -> bool:
        """Whether a run of another config has written here."""
        own = {name: config[name] for name in config if name != "description"}
        return self.run.exists() and self._previous().get("config") != own

    def is_validated(self, step: int) -> bool:
        """Whether the validation after so many steps is written."""
        return any(line["step"] == step for line in whole_lines(self.validation))

    def clear(self) -> None:
        """Removes what another run has left, but for a checkpoint."""
        for path in (*self._written, self.run):  # last, what tells that these are a run's
            path.unlink(missing_ok=True)

    def _previous(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self.run.read_text(encoding="utf-8"))
            if isinstance(content["config"], dict) and isinstance(content["starts"], list):
                return content
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        return {}

    def draw(self, title: str) -> list[Path]:
        """Pictures of the metrics and of the last validation, where matplotlib is installed. Returns their paths."""
        if importlib.util.find_spec("matplotlib") is None:
            return []
        from .plots import plot_robustness, plot_training

        training, robustness = self.pictures
        drawn = []
        if lines := whole_lines(self.metrics):
            plot_training(lines, training, title=title)
            drawn.append(training)
        if self.curves.exists():
            plot_robustness(read_rows(self.curves), robustness)
            drawn.append(robustness)
        return drawn

    def append(self, path: Path, entry: Mapping[str, Any]) -> None:
        """One more line, a JSON object."""
        with explained(path, of_run=True), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run may depend on besides its config; fit for JSON."""
    cuda = device.type == "cuda"
    return {
        **versions(),
        "torch_build": torch.__config__.show().strip(),
        "build_info": dict(build_info()),
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "processor": processor_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Of the working directory, with "-dirty" where files differ from it; None where there is no repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
