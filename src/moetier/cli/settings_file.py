"""Options of a command from a TOML file: its keys are the long flags without dashes in front.

    @app.command()
    def command(config: SettingsFile = None, ...): ...

A flag that is given wins over the file. Values are checked as those of flags are; a key that is no option is an error.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

_APART = ("config", "help")


def _read(context: typer.Context, file: str | None) -> str | None:
    """Make the file's values the defaults of the command that is being parsed."""
    if file is None:
        return None
    try:
        found = tomllib.loads(Path(file).expanduser().read_text("utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # of TOML and of UTF-8
        raise typer.BadParameter(f"{file}: not TOML: {error}") from None
    known = {key_of(parameter): parameter for parameter in context.command.params if key_of(parameter) not in _APART}
    defaults: dict[str, Any] = {}
    for key, value in found.items():
        parameter = known.get(key.replace("_", "-"))
        if parameter is None:
            raise typer.BadParameter(f"{file}: unknown key {key}; there are {', '.join(sorted(known))}")
        defaults[str(parameter.name)] = _checked(context, parameter, value, f"{file}: {key}")
    context.default_map = {**(context.default_map or {}), **defaults}
    return file


SettingsFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        callback=_read,
        is_eager=True,
        help="Options from a TOML file, keys as the flags are named; flags win.",
    ),
]


def key_of(parameter: Any) -> str:
    """The key of an option or argument in a file."""
    return str(parameter.opts[0]).lstrip("-").replace("_", "-")


def _checked(context: typer.Context, parameter: Any, value: Any, where: str) -> Any:
    """The value as the command line would have it, if the option can have it."""
    several = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    switch = getattr(parameter, "is_flag", False)
    items = value if several and isinstance(value, list) else [value]
    if not all(isinstance(item, (str, int, float)) and isinstance(item, bool) == switch for item in items):
        wanted = "true or false" if switch else "a list of texts" if several else "one value"
        raise typer.BadParameter(f"{where} = {json.dumps(value, default=str)}: {wanted} is needed")
    told = value if switch else [str(item) for item in items] if several else str(value)
    try:
        parameter.process_value(context, told)
    except Exception as error:
        # By shape, not by class: typer brings its own copy of click in some versions and not in others.
        describe = getattr(error, "message", None)
        if describe is None:
            raise
        raise typer.BadParameter(f"{where}: {describe.rstrip('.')}") from None
    return told


def settings_text(context: typer.Context, changed: Mapping[str, Any]) -> str:
    """The options of a command that is running, but for those that were left alone, as such a file.

    `changed` (by parameter name) is put in place of what was given; None leaves a parameter out.
    """
    lines = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if key_of(parameter) in _APART:
            continue
        value = changed[name] if name in changed else context.params.get(name)
        if value is None or value == () or value == [] or (name not in changed and value == parameter.default):
            continue
        value = list(value) if isinstance(value, tuple) else value
        lines.append(f"{key_of(parameter)} = {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)
