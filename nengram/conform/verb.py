"""What `nengram conform` does: choose whom to ask, ask, print, write, and say whether it passed."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nengram.config import shipped
from nengram.conform.own import Own
from nengram.conform.protocol import Command, Function, Implementation, NoAnswer
from nengram.conform.report import passes, print_reports, to_dict
from nengram.conform.runner import Report, about, conform
from nengram.conform.vectors import DIALECTS, load
from nengram.errors import ConfigError
from nengram.files import write_atomic

ADAPTERS = {"engram-peft": "engram_peft.py"}
"""Implementations that are asked in an interpreter of their own, by a script of `conformance/adapters`."""


def check(
    reply: Callable[[dict[str, Any]], Any], dialects: Sequence[str] = DIALECTS, *, timeout_s: float = 60.0
) -> list[Report]:
    """Ask a Python callable everything of these dialects. Raises DataError if there is no such dialect."""
    implementation = Function(reply, timeout_s=timeout_s)
    return [conform(implementation, load(dialect)) for dialect in dialects]


def run_conform(
    *,
    dialect: str,
    against: str,
    command: str,
    python: str,
    timeout_s: float,
    out: Path | None,
    console: Console,
    replies: dict[str, Callable[[dict[str, Any]], Any]],
) -> bool:
    """Ask, print and write; whether all that was offered is right. `replies`: callables of `against` beside this package's own.

    Raises ConfigError if there is nobody to ask.
    """
    if timeout_s <= 0:
        raise ConfigError(f"--timeout must be above 0 s, got {timeout_s:g}")
    implementation = _chosen(against, command, python, timeout_s, replies)
    try:
        known = _introduced(implementation, against, python)
        reports = [conform(implementation, load(name)) for name in ([dialect] if dialect else DIALECTS)]
    finally:
        implementation.close()
    print_reports(reports, known, console)
    if out is not None:
        line = "nengram conform" + (" --command COMMAND" if command else f" --against {against}")
        line += " --python PYTHON" if python else ""
        write_atomic(out, json.dumps(to_dict(reports, known, line), indent=1, ensure_ascii=False) + "\n")
    return passes(reports)


def _chosen(against: str, command: str, python: str, timeout_s: float, replies: dict[str, Callable]) -> Implementation:
    if command:
        if against != "nengram":
            raise ConfigError("--command and --against both name whom to ask: give one")
        return Command(_words(command), timeout_s=timeout_s)
    if against in ADAPTERS:
        script = shipped("conformance") / "adapters" / ADAPTERS[against]
        return Command([python or sys.executable, str(script)], timeout_s=timeout_s)
    return Function(replies.get(against) or Own(), timeout_s=timeout_s)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--command cannot be read as a command line: {error}") from None
    if not words:
        raise ConfigError("--command is empty")
    return words


def _introduced(implementation: Implementation, against: str, python: str) -> dict[str, str]:
    """Name and version. Raises ConfigError where an adapter says that what it adapts is not installed."""
    if against in ADAPTERS:
        try:
            answer = implementation.ask({"ask": "about"})
        except NoAnswer as lost:
            raise ConfigError(f"--against {against}: {python or 'this interpreter'}: {lost}") from None
        if isinstance(answer, dict) and "missing" in answer:
            raise ConfigError(f"--against {against}: {answer['missing']}; --python names another interpreter")
    return about(implementation)
