"""Recipes: configurations of `segadv train` that are installed with the package, YAML files in segadv/configs.

Keys are checked here, because a mistyped one must be named with its file and the key that may be meant.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError  # type: ignore[attr-defined]

from .checks import did_you_mean
from .train_config import flat

__all__ = ["ConfigFile", "recipe_file", "recipes"]

_FOLDER = Path(__file__).with_name("configs")


def recipes() -> list[str]:
    """The names of the installed recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The file of a recipe, or the YAML file of that name.

    Raises:
        ValueError: neither exists.
    """
    if name in recipes():
        return _FOLDER / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    raise ValueError(
        f"config must be a YAML file or a recipe ({', '.join(recipes())}); "
        f"{name!r} is neither{did_you_mean(name, recipes())}"
    )


class ConfigFile(ActionConfigFile):
    """The option --config: a recipe's name or a YAML file. Errors name the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = recipe_file(values)
        _check_keys(path, [action.dest for action in parser._actions])
        try:
            super().__call__(parser, cfg, str(path), option_string)
        except (TypeError, ValueError, KeyError, ArgumentError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands there twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _check_keys(path: Path, known: Collection[str]) -> None:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values such as 'steps: 300', it holds {content!r}")
    if twice := [key for key in content if "." in str(key) and str(key).partition(".")[0] in content]:
        raise ValueError(f"{path}: {twice[0]} is given beside {twice[0].partition('.')[0]}; nest it under that key")
    for key, value in flat(content).items():
        if value is None:
            raise ValueError(f"{path}: {key} has no value")
        if key not in known:
            raise ValueError(f"{path}: there is no option {key!r}{did_you_mean(key, known)}")
        if parts := [name for name in known if name.startswith(f"{key}.")]:
            raise ValueError(f"{path}: {key} consists of {', '.join(parts)}; got {value!r}")
