"""How a stranger's code is asked: one question, one answer, both plain JSON; the asker outlives whatever happens in between.

An implementation is a Python callable from question to answer, or a command that reads a JSON line and writes a JSON line. Nothing it
does ends the run: an exception, an exit, a silence longer than the time limit, a flood of output or a line that is no JSON all become
one sentence. A command lives in a process group of its own, which is killed whole when it hangs and started again for the next
question.
"""

import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from nengram.errors import ConfigError

LONGEST_ANSWER = 2**24  # bytes; the longest right one is below 2**15
KEPT_OF_STDERR = 4096


class NoAnswer(Exception):
    """What happened instead of an answer, in one sentence."""


class Implementation(Protocol):
    """Whatever can be asked."""

    def ask(self, question: dict[str, Any]) -> Any:
        """The answer as plain JSON values. Raises NoAnswer."""

    def close(self) -> None:
        """End what was started."""


class Function:
    """A Python callable, asked on a thread so that a hang can be left behind. NumPy arrays in its answer become lists."""

    def __init__(self, reply: Callable[[dict[str, Any]], Any], *, timeout_s: float = 60.0) -> None:
        self._reply = reply
        self._timeout_s = timeout_s

    def ask(self, question: dict[str, Any]) -> Any:
        """As in `Implementation`."""
        found: list[tuple[str, Any]] = []
        own_copy = json.loads(json.dumps(question))
        thread = threading.Thread(target=self._answer, args=(own_copy, found), daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if not found:
            raise NoAnswer(f"no answer within {self._timeout_s:g} s")
        kind, value = found[0]
        if kind == "raised":
            raise NoAnswer(value)
        return value

    def close(self) -> None:
        """Nothing was started that ends by itself."""

    def _answer(self, question: dict[str, Any], found: list[tuple[str, Any]]) -> None:
        try:
            found.append(("answer", plain(self._reply(question))))
        except BaseException as error:  # a stranger's sys.exit included
            found.append(("raised", f"raised {type(error).__name__}: {one_line(str(error))}"))


class Command:
    """A command that answers each line of its standard input with a line of its standard output."""

    def __init__(self, argv: Sequence[str], *, timeout_s: float = 60.0) -> None:
        self._argv = list(argv)
        self._timeout_s = timeout_s
        self._process: subprocess.Popen | None = None
        self._unread = b""
        self._complaints = bytearray()

    def ask(self, question: dict[str, Any]) -> Any:
        """As in `Implementation`; after NoAnswer the next question starts the command anew. Raises ConfigError if it cannot start."""
        process = self._process or self._start()
        try:
            line = self._exchange(process, json.dumps(question, separators=(",", ":")).encode() + b"\n")
            return parsed(line)
        except NoAnswer:
            self.close()
            raise

    def close(self) -> None:
        """Kill the command and all that it started."""
        process, self._process, self._unread = self._process, None, b""
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()

    def _start(self) -> subprocess.Popen:
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                self._argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
            )
        except OSError as error:
            raise ConfigError(f"--command: cannot start {self._argv[0]}: {error.strerror or error}") from None
        self._complaints = bytearray()
        threading.Thread(target=_keep_tail, args=(process.stderr, self._complaints), daemon=True).start()
        self._process = process
        return process

    def _exchange(self, process: subprocess.Popen, question: bytes) -> bytes:
        if self._unread.strip():
            raise NoAnswer(f"more than one line for one question: {shown(self._unread)}")
        threading.Thread(target=_write, args=(process.stdin, question), daemon=True).start()
        before, ended, after = self._read(process).partition(b"\n")
        if not ended:
            raise NoAnswer(self._how_it_ended(process, before))
        self._unread = after
        return before

    def _read(self, process: subprocess.Popen) -> bytes:
        """What arrives up to the first line end, the end of output, or a limit."""
        deadline, got = time.monotonic() + self._timeout_s, bytearray()
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in got[-65536:]:
                left = deadline - time.monotonic()
                if left <= 0 or not waiting.select(left):
                    raise NoAnswer(f"no answer within {self._timeout_s:g} s, killed")
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    break
                got += part
                if len(got) > LONGEST_ANSWER:
                    raise NoAnswer(f"an answer longer than {LONGEST_ANSWER:,} bytes, killed")
        return bytes(got)

    def _how_it_ended(self, process: subprocess.Popen, said: bytes) -> str:
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        time.sleep(0.05)  # the last words on stderr may still be on their way
        last = one_line(self._complaints.decode(errors="replace").strip().rpartition("\n")[2])
        code = process.returncode
        how = (
            "closed its output"
            if code is None
            else f"ended with signal {-code}"
            if code < 0
            else f"ended with exit code {code}"
        )
        half = f" in the middle of an answer ({shown(said)})" if said.strip() else ""
        return f"{how}{half}{': ' + last if last else ''}"


def parsed(line: bytes) -> Any:
    """The JSON value of a line. Raises NoAnswer if it is none."""
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise NoAnswer(f"not JSON: {shown(line)} ({one_line(str(error))})") from None


def plain(value: Any) -> Any:
    """An answer with NumPy arrays and numbers as Python's, keys as strings."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def shown(data: bytes) -> str:
    """The beginning of some bytes, fit for a message."""
    return one_line(repr(data[:60].decode(errors="replace"))) + ("..." if len(data) > 60 else "")


def one_line(text: str) -> str:
    """Text on one line, not too long, nothing in it that moves the cursor."""
    words = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return words if len(words) <= 200 else f"{words[:197]}..."


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _keep_tail(stream: Any, kept: bytearray) -> None:
    with suppress(OSError, ValueError):
        while part := stream.read(4096):
            kept += part
            del kept[:-KEPT_OF_STDERR]
    with suppress(OSError):
        stream.close()


def _write(stream: Any, data: bytes) -> None:
    with suppress(OSError, ValueError):  # whoever does not read will not answer, which is what gets reported
        view = memoryview(data)
        while view:
            view = view[stream.write(view) :]
