"""The command line: each verb imports its room inside the function and calls one library function.

So `--help` is quick (no torch), and whatever a verb does can be done from Python in one call. A user's mistake ends in one line and
exit code 2; Ctrl-C in 130 and a word on how to go on.
"""

import errno
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Union

import tyro

import nengram.errors
from nengram.cli import border, tables, verbs

__all__ = ["GROUPS", "KEPT", "OF_THE_USER", "VERBS", "border", "choose", "main", "tables", "verbs"]

VERBS = {
    "compare": verbs.compare,
    "sweep": verbs.sweep,
    "train": verbs.train,
    "eval": verbs.eval,
    "gain": verbs.gain,
    "generate": verbs.generate,
    "graft": border.graft,
    "serve": border.serve,
    "export": border.export,
    "trace": verbs.trace,
    "twin": verbs.twin,
    "data": verbs.data,
    "plan": verbs.plan,
    "conform": verbs.conform,
    "table stat": tables.table_stat,
    "table verify": tables.table_verify,
    "table pack": tables.table_pack,
    "table slice": tables.table_slice,
    "table create": tables.table_create,
    "table convert": tables.table_convert,
    "table diff": tables.table_diff,
    "table codecs": tables.table_codecs,
    "table health": tables.table_health,
}
GROUPS = {
    "table": "Tables on disk: describe, verify, pack, slice, create, convert, diff; what codecs cost, what training did."
}


KEPT = {  # what an end before the end leaves of the verbs that take long
    "compare": "what was finished is kept, --resume continues",
    "train": "what was finished is kept, --resume continues",
    "graft": "what was finished is kept, --resume continues",
    "sweep": "what was finished is kept, the same command continues",
}
OF_THE_USER = (  # errors of the system that a user can mend
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
)


def main() -> None:
    """Entry point of the `nengram` command."""
    warnings.showwarning = _warn
    try:
        choose(VERBS, prog="nengram", description="Conditional memory (Engram) for language models.")
    except nengram.errors.NengramError as error:
        _end(str(error), 2)
    except KeyboardInterrupt:
        _end(f"interrupted; {KEPT.get(''.join(sys.argv[1:2]), 'nothing half-written is left')}", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in OF_THE_USER:
            raise
        kept = KEPT.get("".join(sys.argv[1:2]), "nothing half-written is left")
        _end(f"{error.filename or 'disk'}: {error.strerror}; {kept}", 2)


def choose(verbs: dict[str, Callable], **options: Any) -> Any:
    """Parse the command line and call the verb it names: "table stat" is the verb `stat` of the group `table`.

    options: as `tyro.cli` takes them.
    """
    grouped: dict[str, dict[str, Callable]] = {}
    for name, function in verbs.items():
        group, _, own = name.rpartition(" ")
        grouped.setdefault(group, {})[own] = function
    top = [(name, function, None) for name, function in grouped.pop("", {}).items()]
    top += [(name, _one_of([(*verb, None) for verb in inner.items()]), GROUPS[name]) for name, inner in grouped.items()]
    return tyro.cli(_one_of(top), **options)


def _one_of(choices: list[tuple[str, Any, str | None]]) -> Any:
    """The type that tyro reads as one subcommand of several: name, function or such a type, description."""
    subcommand = tyro.conf.subcommand
    return Union[  # noqa: UP007 - made at run time
        tuple(Annotated[Any, subcommand(name, constructor=made, description=about)] for name, made, about in choices)
    ]


def _end(message: str, code: int) -> None:
    print(f"nengram: {message}", file=sys.stderr)
    sys.exit(code)


def _warn(message, *_) -> None:
    print(f"nengram: note: {message}", file=sys.stderr)
