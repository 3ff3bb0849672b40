"""What the verbs share: the forms of their arguments, and what they do to the terminal."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from nengram.config import TableOptions
from nengram.errors import ConfigError

Tables = Annotated[TableOptions, tyro.conf.OmitArgPrefixes]
Overrides = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[section.key=value ...]")]
Source = Annotated[Path, tyro.conf.arg(metavar="SOURCE")]
Into = Annotated[Path, tyro.conf.arg(metavar="INTO")]


def results_folder(path: Path | None) -> Path | None:
    """A folder for results, there or yet to be made. Raises ConfigError, before hours of work, where a file is in its place."""
    for place in (path, *path.parents) if path else ():
        if place.exists() and not place.is_dir():
            raise ConfigError(f"{place}: is a file; results need a folder, choose another --out")
    return path


def no_others(what: str, **given: Any) -> None:
    """Raises ConfigError for the first option that says something and would not be heard."""
    for name, value in given.items():
        if value:
            raise ConfigError(f"--{name} has no part in {what}: leave it out")


def terminal(*, stderr: bool = False):
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, stderr=stderr)


def show(config) -> None:
    from nengram.config import differences

    for key, default, value in differences(config):
        print(
            f"  {key} = {json.dumps(value)}"
            + (f"  (default {json.dumps(default)})" if default not in ("", [], {}) else "")
        )
