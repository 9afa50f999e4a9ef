"""Choosing by name: `name(key=value, ...)`, from a registry or from a third party's module."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from moetier.errors import ConfigError

Factory = Callable[..., Any]


def split_names(text: str) -> list[str]:
    """`a,b(x=1,y=2)` as its names: commas within parentheses do not separate."""
    return [name.strip() for name in re.split(r",(?![^(]*\))", text) if name.strip()]


def parse_name(kind: str, text: str) -> tuple[str, dict[str, Any]]:
    """`name(key=value, ...)` as a name and its parameters; numbers, true and false are read as such.

    `kind`, "policy" or "predictor", is for the messages. Raises `ConfigError` for what is not of this form.
    """
    match = re.fullmatch(r"\s*([^()]+?)\s*(?:\((.*)\))?\s*", text)
    if match is None:
        raise ConfigError(f"{kind} {text!r} is not a name, nor a name with parameters such as slru(protected=0.5)")
    parameters: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in (match[2] or "").split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (equals and key and value):
            raise ConfigError(f"{kind} {text!r}: {item!r} is not a parameter; write key=value")
        parameters[key] = _value(value)
    return match[1], parameters


def find(kind: str, name: str, registry: Mapping[str, Factory | str]) -> Factory:
    """What a name stands for: an entry, or the place `"package.module:Class"` that an entry or the name itself gives.

    Raises `ConfigError` for a name that is neither.
    """
    place = registry.get(name, name)
    if not isinstance(place, str):
        return place
    module, colon, attribute = place.partition(":")
    if not colon:
        known = ", ".join(sorted(registry))
        raise ConfigError(f'unknown {kind} {name!r}; choose one of: {known}, or give "package.module:Class"')
    try:
        factory: Factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind} {name!r} cannot be imported: {error}") from error
    return factory


def build(kind: str, text: str, registry: Mapping[str, Factory | str], *arguments: int) -> Any:
    """Call what `text` names with `arguments` and its parameters. Raises `ConfigError` for parameters it has not."""
    name, parameters = parse_name(kind, text)
    factory = find(kind, name, registry)
    known = list(inspect.signature(factory).parameters)[len(arguments) :]
    for parameter in parameters:
        if parameter not in known:
            has = f"its parameters are: {', '.join(known)}" if known else "it has no parameters"
            raise ConfigError(f"{kind} {name!r} has no parameter {parameter!r}; {has}")
    return factory(*arguments, **parameters)


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
