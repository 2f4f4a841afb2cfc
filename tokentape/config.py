"""Loads settings: `tokentape.toml`, then `TOKENTAPE_…` variables, then `--set key=value`, in that order of rising weight."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from schemas.errors import SettingsError
from schemas.settings import Settings

DEFAULT_FILE = Path("tokentape.toml")

PREFIX = "TOKENTAPE_"

RESERVED = {f"{PREFIX}{name}" for name in ("CONFIG", "CACHE", "SERVICES", "CRASH_AT", "SUPERVISED")}
"""Variables that steer the program or its tests and are no settings."""


def load(
    *,
    file: Path | None = None,
    data: Path | None = None,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of this call; `overrides` are `key=value` texts with dotted keys.

    Raises:
        SettingsError: a file that cannot be read or parsed, an unknown key, a value that is not valid.
    """
    environ = os.environ if environ is None else environ
    tree = _from_file(file or _configured_file(environ))
    for name, value in environ.items():
        if name.startswith(PREFIX) and name not in RESERVED:
            _put(tree, name[len(PREFIX) :].lower().split("__"), value, place=name)
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise SettingsError(f"--set takes key=value, got {text!r}", hint="for example --set log.kind=kafka")
        _put(tree, key.strip().split("."), value, place=f"--set {key}")
    if data is not None:
        tree["data"] = str(data)
    return _validated(tree)


def _configured_file(environ: Mapping[str, str]) -> Path | None:
    if "TOKENTAPE_CONFIG" in environ:
        return Path(environ["TOKENTAPE_CONFIG"])
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            error.strerror or str(error), operation="read settings", place=str(path), hint="name a readable file with --config"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"not TOML: {error}", operation="read settings", place=str(path), hint="compare with tokentape.example.toml"
        ) from error


def _put(tree: dict[str, Any], path: list[str], value: str, *, place: str) -> None:
    """Set a dotted key to a text."""
    model: type[BaseModel] = Settings
    node = tree
    for name in path[:-1]:
        field = _field(model, name, place)
        if not (isinstance(field, type) and issubclass(field, BaseModel)):
            raise SettingsError(f"{name!r} is no section", place=place, hint=f"valid sections: {', '.join(_sections(model))}")
        model, node = field, node.setdefault(name, {})
    _field(model, path[-1], place)
    node[path[-1]] = value  # pydantic reads numbers and booleans out of texts


def _field(model: type[BaseModel], name: str, place: str) -> Any:
    if name not in model.model_fields:
        close = difflib.get_close_matches(name, model.model_fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(model.model_fields)}"
        raise SettingsError(f"unknown setting {name!r}", place=place, hint=hint)
    return model.model_fields[name].annotation


def _sections(model: type[BaseModel]) -> list[str]:
    return [n for n, f in model.model_fields.items() if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel)]


def _section(path: tuple[str | int, ...]) -> type[BaseModel]:
    """The model at a path, also within lists and tables of models."""
    section: Any = Settings
    for part in path:
        if isinstance(section, type) and issubclass(section, BaseModel):
            section = section.model_fields[str(part)].annotation
        else:
            section = typing.get_args(section)[-1]  # what a list or a table holds
    found: type[BaseModel] = section
    return found


def _validated(tree: dict[str, Any]) -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            _field(_section(first["loc"][:-1]), str(first["loc"][-1]), place)
        plain = isinstance(first["input"], str | int | float) and "key" not in place  # a wrong secret is still a secret
        got = f", got {first['input']!r}" if plain else ""
        raise SettingsError(f"{first['msg']}{got}", place=place, hint="see tokentape.example.toml") from error


def example() -> str:
    """The documented example file: every setting with its default, made from the models so that it never lies."""
    lines = ["# Every setting with its default. Copy what you change into tokentape.toml.", ""]
    sections = []
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append((name, field.annotation))
        else:
            lines += _documented(name, field)
    for name, model in sections:
        lines += ["", f"# {(model.__doc__ or '').strip()}", f"[{name}]"]
        for key, field in model.model_fields.items():
            lines += _documented(key, field)
    return "\n".join(lines) + "\n"


def _documented(name: str, field: Any) -> list[str]:
    default = field.default
    if hasattr(default, "get_secret_value"):
        default = default.get_secret_value()
    if isinstance(default, Path):
        default = str(default)
    choices = getattr(field.annotation, "__args__", None)
    valid = f" Valid: {', '.join(map(str, choices))}." if choices and all(isinstance(c, str) for c in choices) else ""
    comment = f"  # {(field.description or '') + valid}".rstrip(" #").replace("#  ", "# ")
    if default is None:
        return [f'# {name} = ""{comment}']
    return [f"{name} = {json.dumps(default)}{comment}"]
