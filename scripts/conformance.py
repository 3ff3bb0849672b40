"""The committed conformance vectors are what the plain-integer reference says: this writes them, twice the same.

`python scripts/conformance.py` rewrites `conformance/v1`; with `--check` it only says whether that would change a byte (exit code 1).
"""

import sys
from pathlib import Path

from nengram.conform.cases import generate
from nengram.conform.vectors import DIALECTS, FORMAT, dump
from nengram.files import write_atomic

FOLDER = Path(__file__).parents[1] / "conformance" / f"v{FORMAT}"


def main() -> int:
    """Write every dialect's file, or with --check compare."""
    stale = []
    for dialect in DIALECTS:
        path, text = FOLDER / f"{dialect}.json", dump(generate(dialect))
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if "--check" not in sys.argv[1:]:
                write_atomic(path, text)
    print(f"changed: {', '.join(stale)}" if stale else "nothing changed")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
