"""The lookup's own contribution, as a curve over training.

With `train.meter_every` a run judges dev twice at each look: as it is, and with the rows of every slot in another order, which leaves
every weight, every path and every row in place and takes away only which n-gram finds which row. The difference is what the model
reads out of its tables by now. It begins at zero, rises once rows have been met again, and jumps at a second pass when tables hold
what followed each n-gram rather than what follows it in general.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nengram.errors import CheckpointError
from nengram.study.outcome import pyplot, save_picture


class Meter(NamedTuple):
    """One run's looks at dev, float64 [P]: tokens trained on, loss, loss with permuted rows minus loss (NaN where not metered)."""

    tokens_P: np.ndarray
    dev_nats_P: np.ndarray
    lookup_nats_P: np.ndarray


def meter_of(folder: str | Path) -> Meter:
    """The curve of a run folder, finished or not. Raises CheckpointError when it holds no metrics or never looked at dev."""
    path = Path(folder) / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        looks = [record for record in records if record["dev_nats"] is not None]
        tokens, dev = ([record[key] for record in looks] for key in ("tokens", "dev_nats"))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: no metrics of a run ({error})") from None
    if not looks:
        raise CheckpointError(f"{path}: the run never looked at dev; set train.meter_every or train.eval_every")
    permuted = [record.get("dev_nats_permuted") for record in looks]
    lookup = [np.nan if value is None else value - nats for value, nats in zip(permuted, dev, strict=True)]
    return Meter(*(np.array(values, dtype=np.float64) for values in (tokens, dev, lookup)))


def draw_meter(groups: Mapping[str, list[Meter]], path: Path, *, pass_tokens: int = 0) -> Path | None:
    """Dev loss and the lookup's contribution over training tokens, a line a label, thin for single runs and thick for their mean.

    groups: runs of equal steps by label. pass_tokens: tokens of one pass over the text, for a line where the next begins.
    Returns None where matplotlib is not installed.
    """
    plt = pyplot()
    if plt is None:
        return None
    metered = any(np.isfinite(meter.lookup_nats_P).any() for meters in groups.values() for meter in meters)
    figure, axes = plt.subplots(
        1, 1 + metered, figsize=(5.5 * (1 + metered), 4), constrained_layout=True, squeeze=False
    )
    names = ("dev_nats_P", "lookup_nats_P")
    titles = ("dev loss (nats)", "what the lookup contributes (nats):\ndev loss with permuted rows minus dev loss")
    for axis, name, title in zip(axes[0], names, titles, strict=False):
        for colour, (label, meters) in enumerate(groups.items()):
            curves = [getattr(meter, name) for meter in meters]
            if not np.isfinite(curves[0]).any():
                continue
            for curve in curves if len(curves) > 1 else []:
                axis.plot(meters[0].tokens_P / 1e6, curve, color=f"C{colour}", lw=0.6, alpha=0.5)
            axis.plot(meters[0].tokens_P / 1e6, np.mean(curves, axis=0), color=f"C{colour}", lw=1.8, label=label)
        if pass_tokens and any(meters[0].tokens_P[-1] > pass_tokens for meters in groups.values()):
            axis.axvline(pass_tokens / 1e6, color="0.5", lw=0.8, ls="--")
        axis.set(xlabel="training tokens (millions)", ylabel=title)
        axis.legend(frameon=False, fontsize=8)
    low = min(np.nanmin(meter.dev_nats_P) for meters in groups.values() for meter in meters)
    axes[0][0].set_ylim(low - 0.05, low + 1.5)
    return save_picture(figure, path)
