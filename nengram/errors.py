"""What a user's mistake becomes: one clear line that says what is wrong, where, and what to do.

    NengramError
    ├── ConfigError       an option, a preset, a budget that cannot be met
    ├── DataError         text, tokenizers, corpora, downloads
    ├── AddressError      ids, specs, row controls
    ├── StoreError        tables, rows, tickets
    └── CheckpointError   run folders and files that are missing, damaged or of another model

The command line prints the line and exits with 2; everything else that is raised is a fault of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class NengramError(Exception):
    """Base of every error a user can cause. Its text is one line, fit to be printed alone."""


class ConfigError(NengramError):
    """An option, preset or budget that does not exist or cannot be met."""


class DataError(NengramError):
    """Text, tokenizers, corpora, downloads."""


class AddressError(NengramError):
    """Ids out of range, address specs, row controls."""


class StoreError(NengramError):
    """Tables, rows and tickets."""


class CheckpointError(NengramError):
    """A run folder or file that is missing, damaged, or belongs to another model."""


def nearest(name: str, options: Iterable[str]) -> str:
    """` (did you mean "x"?)` for the option closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""
