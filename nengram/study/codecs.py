"""What a smaller table costs: the error of its rows, and what the model loses with it, under every codec.

An error per row says little by itself: a gate may ignore the rows that suffered, and a projection may average the
errors away. So the trained model is judged with each of its tables encoded and decoded, on the same held-out tokens,
and the losses are subtracted token by token. That pairing is what makes a difference of a ten-thousandth of a nat
visible: the spread between tokens is nats wide and cancels. The standard error takes tokens for independent, which
those of one document are not quite.

Errors are relative to the row: the largest error over the largest number, and the root of the mean square of both.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from nengram.errors import CheckpointError, StoreError, nearest
from nengram.infer import LoadedRun, load_run
from nengram.store import ResidentStore, Store
from nengram.store.codecs import CODECS, Codec, Fp8Tensor, make_codec
from nengram.study.outcome import keep_outcome, pyplot, save_picture
from nengram.study.reading import own_corpus
from nengram.train import environment, token_nats

ROWS_AT_ONCE = 65_536


def codec_report(
    run: Path,
    codecs: Sequence[str] = tuple(CODECS),
    split: str = "dev",
    tokens: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Size, errors and loss of a finished run's tables under each codec.

    Args:
        codecs: names out of `CODECS`.
        split: held-out text to judge on, of the run's own corpus.
        tokens: judge about so many tokens; 0: the whole split.
        say: told what is being done.
    Returns {"run", "split", "tokens", "nats", "codecs": {name: {"row_bytes", "table_bytes", "nats", "difference",
    "standard_error", "tables": {layer_id: errors}}}, "environment"}; losses in nats a token, `difference` against the
    table as it is; a codec that cannot hold a table has "refused" with the reason instead.
    Raises: CheckpointError for a run without tables, StoreError for an unknown codec, DataError for another corpus.
    """
    for name in codecs:
        if name not in CODECS:
            raise StoreError(f'unknown codec "{name}"{nearest(name, CODECS)}; there are {", ".join(CODECS)}')
    loaded = load_run(run)
    if not loaded.model.stores:
        raise CheckpointError(f"{run}: this model has no memory layer, hence no table to encode")
    packed = own_corpus(loaded, run).splits[split]

    def judge() -> np.ndarray:
        sizes = {"batch": loaded.config.train.batch, "context": loaded.config.model.context}
        return token_nats(loaded.model, packed, tokens=tokens, **sizes)

    say("judging the tables as they are")
    stores = dict(loaded.model.stores)
    nats_N = judge()
    found = {}
    for name in codecs:
        say(f"judging {name}")
        try:
            found[name] = under_codec(name, stores, loaded, nats_N, judge)
        except StoreError as error:
            found[name] = {"refused": str(error)}
    return {
        "run": str(run),
        "split": split,
        "tokens": int(np.isfinite(nats_N).sum()),
        "nats": float(np.nanmean(nats_N)),
        "codecs": found,
        "environment": environment(),
    }


def under_codec(
    name: str, stores: dict[int, Store], loaded: LoadedRun, nats_N: np.ndarray, judge: Callable[[], np.ndarray]
) -> dict:
    """One codec's part of the report. The model has its own stores back when this returns."""
    coded = {layer_id: codec_for(name, store) for layer_id, store in stores.items()}
    tables, total_bytes = {}, 0
    try:
        for layer_id, store in stores.items():
            bytes_RB, tables[layer_id] = encoded_table(store, coded[layer_id])
            total_bytes += bytes_RB.numel()
            loaded.model.stores[layer_id] = ResidentStore.from_bytes(bytes_RB, coded[layer_id], device=store.device)
        is_same = not any(table["changed_rows"] for table in tables.values())
        under_N = nats_N if is_same else judge()
    finally:
        loaded.model.stores.update(stores)
    return {
        "row_bytes": max(codec.row_bytes for codec in coded.values()),
        "table_bytes": total_bytes,
        "nats": float(np.nanmean(under_N)),
        **paired_by_token(under_N, nats_N),
        "tables": tables,
    }


def codec_for(name: str, store: Store) -> Codec:
    """The codec for one table; `fp8_tensor` gets the scale that the table's largest number asks for."""
    if name != Fp8Tensor.name:
        return make_codec(name, store.row_width)
    largest = max(float(vectors_NE.abs().max()) for _, vectors_NE in vectors_of(store))
    return make_codec(name, store.row_width, scale=Fp8Tensor.scale_for(largest))


def vectors_of(store: Store) -> Iterator[tuple[int, torch.Tensor]]:
    """First row and float32 vectors of each span of a table, on the CPU."""
    for first in range(0, store.num_rows, ROWS_AT_ONCE):
        rows_N = torch.arange(first, min(first + ROWS_AT_ONCE, store.num_rows))
        yield first, store.codec.decode(store.read_coded(rows_N)).float()


def encoded_table(store: Store, codec: Codec) -> tuple[torch.Tensor, dict]:
    """A table's bytes under a codec, uint8 `[R, B]`, and the errors of its rows."""
    bytes_RB = torch.empty(store.num_rows, codec.row_bytes, dtype=torch.uint8)
    largest_R, rms_R, changed_R = (np.empty(store.num_rows, dtype=np.float32) for _ in range(3))
    for first, vectors_NE in vectors_of(store):
        span = slice(first, first + len(vectors_NE))
        bytes_RB[span] = codec.encode(vectors_NE)
        error_NE = codec.decode(bytes_RB[span]).float() - vectors_NE
        largest_R[span] = error_NE.abs().amax(1) / vectors_NE.abs().amax(1)
        rms_R[span] = error_NE.norm(dim=1) / vectors_NE.norm(dim=1)
        changed_R[span] = (error_NE != 0).any(1)
    return bytes_RB, {
        "rows": store.num_rows,
        "codec": codec.to_dict(),
        "max_relative_error": median_and_p99(largest_R),
        "rms_relative_error": median_and_p99(rms_R),
        "changed_rows": float(changed_R.mean()),
    }


def median_and_p99(errors_R: np.ndarray) -> dict[str, float]:
    """Over the rows that are not all zeros (whose relative error is 0 / 0); zeros when there are none."""
    errors_R = errors_R[np.isfinite(errors_R)]
    median, p99 = np.percentile(errors_R, (50, 99)).tolist() if errors_R.size else (0.0, 0.0)
    return {"median": median, "p99": p99}


def paired_by_token(nats_N: np.ndarray, baseline_N: np.ndarray) -> dict[str, float]:
    """Mean difference in loss over the tokens judged, and its standard error."""
    difference_N = (nats_N.astype(np.float64) - baseline_N)[np.isfinite(baseline_N)]
    error = difference_N.std(ddof=1) / math.sqrt(difference_N.size) if difference_N.size > 1 else math.nan
    return {"difference": float(difference_N.mean()), "standard_error": float(error)}


def run_codec_report(
    run: Path,
    *,
    codecs: Sequence[str] = tuple(CODECS),
    split: str = "dev",
    tokens: int = 0,
    as_json: bool = False,
    out: Path | None = None,
    console: Console,
) -> dict:
    """`codec_report` for the command line: a table, or JSON; with `out`, codecs.json and codecs.png in that folder."""
    if as_json:
        found = codec_report(run, codecs, split, tokens)
        print(json.dumps(found, indent=1))
    else:
        with console.status("opening the run") as status:
            found = codec_report(run, codecs, split, tokens, status.update)
        console.print(report_table(found))
        for name, one in found["codecs"].items():
            if "refused" in one:
                console.print(f"{name}: {one['refused']}", highlight=False)
    if out is not None:
        keep_outcome(found, out, "codecs", draw, None if as_json else console)
    return found


def report_table(found: dict) -> Table:
    """A line for each codec and table; size and loss stand in the first of a codec's lines."""
    table = Table(
        title=f"{found['run']}: {found['nats']:.4f} nats on {found['tokens']:,} tokens of {found['split']} as it is",
        title_justify="left",
    )
    headings = (
        "codec",
        "bytes\na row",
        "tables\nMiB",
        "layer",
        "max error\nmedian",
        "\np99",
        "rms error\nmedian",
        "\np99",
        "rows\nchanged",
        "loss, nats\n(paired)",
        "standard\nerror",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "codec" else "right")
    for name, one in found["codecs"].items():
        for place, (layer_id, errors) in enumerate(one.get("tables", {}).items()):
            first = [name, f"{one['row_bytes']}", f"{one['table_bytes'] / 2**20:.2f}"]
            last = [f"{one['difference']:+.6f}", f"{one['standard_error']:.6f}"]
            table.add_row(
                *(first if place == 0 else [""] * 3),
                str(layer_id),
                *(
                    f"{errors[kind][at]:.2%}"
                    for kind in ("max_relative_error", "rms_relative_error")
                    for at in errors[kind]
                ),
                f"{errors['changed_rows']:.1%}",
                *(last if place == 0 else [""] * 2),
            )
    return table


def draw(found: dict, path: Path) -> Path | None:
    """Bytes a row against the loss that the codec adds. None where matplotlib is not installed."""
    plt = pyplot()
    if plt is None:
        return None
    shown = {name: one for name, one in found["codecs"].items() if "refused" not in one}
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    axes.axhline(0, color="0.3", lw=0.8)
    sizes = sorted({one["row_bytes"] for one in shown.values()})
    drawn = dict.fromkeys(sizes, 0)
    for name, one in shown.items():
        size = one["row_bytes"]
        beside = size * 1.02 ** drawn[size]  # codecs of one size would hide each other
        drawn[size] += 1
        axes.errorbar(beside, one["difference"], 2 * one["standard_error"], fmt="o", capsize=3, label=name)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlabel="bytes a row", ylabel=f"loss added on {found['split']}, nats a token")
    axes.legend(frameon=False, fontsize=8, title="bars: 2 standard errors", title_fontsize=8)
    return save_picture(figure, path)
