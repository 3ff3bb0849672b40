"""What a study leaves in its folder: its numbers as JSON, and a picture where matplotlib is installed. Both whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from nengram.files import atomic_path, write_atomic


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files; None where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    return plt


def save_picture(figure: Any, path: Path, **options: Any) -> Path:
    """Write a figure as PNG and close it; options as `Figure.savefig` takes them. Raises OSError."""
    with atomic_path(path) as beside:
        figure.savefig(beside, format="png", **({"dpi": 130} | options))
    pyplot().close(figure)
    return path


def keep_outcome(
    found: dict, out: Path, name: str, draw: Callable[[dict, Path], Path | None], console: Console | None
) -> None:
    """Write `<name>.json` and `<name>.png` into `out`, and say so on the console, if one is given. Raises OSError."""
    write_atomic(out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    picture = draw(found, out / f"{name}.png")
    if console is not None:
        kept = [str(out / f"{name}.json"), str(picture) if picture else "no picture: pip install nengram[plot]"]
        console.print(", ".join(kept), highlight=False, markup=False)
