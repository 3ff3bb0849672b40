"""Rebuild the bundled slice from its packages and compare it, byte for byte, with what is committed under
data/bundled.

The slice is a reading of two pinned packages (the mix "bundled" of configs/sources.toml), so anybody can make
it again; this is the proof. `--write` replaces the committed files and their digests, for whoever changes a
renderer on purpose.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from nengram.errors import NengramError
from nengram.files import sha256_file, write_atomic
from nengram.text.fetch import fetch

BUNDLED = Path(__file__).parents[1] / "data" / "bundled"
SUMS = BUNDLED / "SHA256SUMS"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the committed files instead of comparing")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as temporary:
        try:
            report = fetch("bundled", temporary)
        except NengramError as error:
            print(error, file=sys.stderr)
            return 2
        if any(source.path is None for source in report.sources):
            print("not every package could be had, so there is nothing to compare", file=sys.stderr)
            return 2
        sums = "".join(f"{sha256_file(path)}  {path.name}\n" for path in sorted(report.paths))
        if write:
            for path in report.paths:
                shutil.copyfile(path, BUNDLED / path.name)
            write_atomic(SUMS, sums)
    if sums != SUMS.read_text(encoding="utf-8"):
        print(f"the rebuilt files differ from {SUMS}:\n{sums}", file=sys.stderr)
        return 1
    print(f"the rebuilt files are those of {SUMS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
