"""Frozen dataclasses as settings: checked types, the command line, files under `configs/`, JSON.

The settings of training are in `config.py`; curation and downstream tasks have their own.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal


def _allowed(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_allowed(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is ...:
            args = args[:1] * len(value)
        return len(value) == len(args) and all(map(_allowed, value, args))
    if hint in (int, float):
        number = isinstance(value, (int, float) if hint is float else int)
        return number and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(arg) for arg in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        names = ("..." if arg is ... else _type_name(arg) for arg in typing.get_args(hint))
        return ",".join(names)
    return "None" if hint is type(None) else hint.__name__


def check_types(part: Any, name: str) -> None:
    """Check every field of a (nested) dataclass against its annotation; `name` is for messages.

    Raises:
      ValueError: naming the field, its value and what is allowed.
    """
    hints = typing.get_type_hints(type(part))
    for item in dataclasses.fields(part):
        value, path = getattr(part, item.name), f"{name}.{item.name}"
        if not _allowed(value, hints[item.name]):
            raise ValueError(f"{path}={value!r}: must be {_type_name(hints[item.name])}")
        if dataclasses.is_dataclass(value):
            check_types(value, path)


def from_arguments(cfg: Any, arguments: list[str]) -> Any:
    """`cfg` with every `--config.field=value` or `--config.field value` of a command line set.

    Raises:
      ValueError: for anything else among the arguments, and as `override`.
    """
    items = iter(arguments)
    for item in items:
        if not item.startswith("--config."):
            raise ValueError(f"unknown argument {item}")
        path, equals, value = item.removeprefix("--config.").partition("=")
        cfg = override(cfg, path, value if equals else _next_value(item, items))
    return cfg


def set_fields(settings: Any, arguments: list[str]) -> Any:
    """`settings` with every `--field=value` or `--field value` set.

    Raises:
      ValueError: an unknown field, a value of the wrong type, or something else.
    """
    items = iter(arguments)
    for item in items:
        if not item.startswith("--"):
            raise ValueError(f"unknown argument {item!r}; fields are set as --field=value")
        path, equals, value = item[2:].partition("=")
        if not equals:
            value = _next_value(item, items)
        settings = override(settings, path.replace("-", "_"), value, "settings")
    return settings


def _next_value(item: str, items: Iterator[str]) -> str:
    value = next(items, None)
    if value is None or value.startswith("--"):
        raise ValueError(f"{item}: needs a value")
    return value


def override(cfg: Any, path: str, text: str, name: str = "config") -> Any:
    """A copy of a dataclass with the field at dotted `path` set from the command line's `text`.

    Args:
      name: what messages call `cfg`.

    Raises:
      ValueError: for an unknown field (naming the nearest one) or a value of the wrong type.
    """
    return _override(cfg, path.split("."), text, name)


def _override(part: Any, names: list[str], text: str, where: str) -> Any:
    known = [item.name for item in dataclasses.fields(part)]
    name, *rest = names
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        guess = f"; did you mean {where}.{near[0]}?" if near else ""
        raise ValueError(f"{where}.{name} does not exist{guess} (fields: {', '.join(known)})")
    where, value, hint = f"{where}.{name}", getattr(part, name), typing.get_type_hints(type(part))
    if dataclasses.is_dataclass(value):
        if not rest:
            fields = ", ".join(f"{where}.{f.name}" for f in dataclasses.fields(value))
            raise ValueError(f"{where} is a group of fields, set one of them: {fields}")
        return dataclasses.replace(part, **{name: _override(value, rest, text, where)})
    if rest:
        raise ValueError(f"{where} is a single value, it has no field {rest[0]!r}")
    return dataclasses.replace(part, **{name: _parse(text, hint[name], where)})


def _parse(text: str, hint: Any, where: str) -> Any:
    if text.lower() == "none" and _allowed(None, hint):
        return None
    if _allowed(text, hint):  # a plain word for a text field
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # as its docs say
        value = {"true": True, "false": False}.get(text.lower(), text)
    if not _allowed(value, hint):
        raise ValueError(f"{where}={text}: must be {_type_name(hint)}")
    return value


def load(path: str | Path, kind: type) -> Any:
    """Run `get_config()` of a file under `configs/`.

    Args:
      kind: dataclass that it must return.

    Raises:
      ValueError: if the file is missing or has no `get_config` that returns a `kind`.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise ValueError(f"--config={path}: no such file (there are: {', '.join(beside) or '-'})")
    if path.suffix != ".py":
        raise ValueError(f"--config={path}: must be a .py file with get_config(), as in configs/")
    spec = importlib.util.spec_from_file_location(f"flip_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        cfg = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:  # it is code, and may raise anything
        raise ValueError(f"--config={path}: {type(error).__name__}: {error}") from error
    if not isinstance(cfg, kind):
        raise ValueError(
            f"--config={path}: needs a function get_config() -> {kind.__module__}.{kind.__name__}"
        )
    return cfg


def to_dict(cfg: Any) -> dict[str, Any]:
    """Nested plain dict, ready for JSON."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in items}

    return dataclasses.asdict(cfg, dict_factory=plain)


def from_dict(values: dict[str, Any], kind: type) -> Any:
    """The inverse of `to_dict`.

    Raises:
      ValueError: if a field is unknown, as in a config of another version, or not a table of
        fields where it must be.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} is {values!r}, not a table of fields")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}")
    return kind(**{name: _from_plain(value, hints[name]) for name, value in values.items()})


def _from_plain(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(value, hint)
    return tuple(value) if isinstance(value, list) else value
