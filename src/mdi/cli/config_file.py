"""--config: options of a command from a YAML file, under their long names. What is typed overrides the file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.core import TyperCommand

from mdi.core.errors import ConfigError


class CommandLikeVllms(TyperCommand):
    """A command that takes several words after an option which may be repeated, once its argument is given.

    `mdi serve MODEL --served-model-name a b` is `--served-model-name a --served-model-name b`. Words in the names of
    options may be joined by _ as well as by -.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.context_settings["token_normalize_func"] = lambda name: name.replace("_", "-")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeated = {name for item in self.params if getattr(item, "multiple", False) for name in item.opts}
        if args and not args[0].startswith("-"):
            args = list(_spread(args, repeated))
        return super().parse_args(ctx, args)


def _spread(args: list[str], repeated: set[str]) -> Iterator[str]:
    """The arguments, with a repeated option before each of its words."""
    option, n_words = "", 0
    for word in args:
        if word.startswith("-"):
            option, n_words = word, 0
        else:
            n_words += 1
            if n_words > 1 and option.replace("_", "-") in repeated:
                yield option
        yield word


def use_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config: the file's values become the defaults of other options. Raises ConfigError for bad ones."""
    if path is not None:
        given = _read(path)
        known = _names(context.command)
        values = {}
        for key, value in given.items():
            name = str(key).replace("_", "-")
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else "its keys are the long names of options"
                raise ConfigError(f"{path}: unknown option {key}: {hint}")
            item = known[name]
            if value is not None:
                values[item.name] = _typed(value, several=getattr(item, "multiple", False))
        context.default_map = values
    return path


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): name a YAML file with options") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no UTF-8, a date that there is not
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where} is not valid YAML: write a line like port: 8000 for each option") from None
    if not isinstance(content or {}, dict):
        raise ConfigError(f"{path} holds no options: write a line like port: 8000 for each")
    return content or {}


def _names(command: Any) -> dict[str, Any]:
    """The parameters of a command by every long name, arguments by their own, without --config itself."""
    names = {item.name.replace("_", "-"): item for item in command.params if item.param_type_name == "argument"}
    for item in command.params:
        names |= {name.removeprefix("--"): item for name in item.opts if name.startswith("--")}
    return {name: item for name, item in names.items() if name not in ("config", "help")}


def _typed(value: Any, *, several: bool) -> Any:
    """A value as it would be typed: words, a truth, or a list of words for a repeated option."""
    if several:
        return [_word(each) for each in (value if isinstance(value, list) else [value])]
    return value if isinstance(value, bool) else _word(value)


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)
