"""Results as people read them: a terminal table, and a picture of the curves with the differences beside them."""

import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nengram.study.outcome import pyplot, save_picture
from nengram.study.verdict import paired, prediction_interval

ARM_TITLES = {
    "moe": "pure MoE",
    "engram": "Engram",
    "one_row": "one row (nothing to look up)",
    "misaligned": "misaligned rows",
    "frozen": "frozen random table",
    "additive": "additive, ungated",
    "no_table": "same experts, no table",
    "wide_shared": "wider shared expert",
}
READING_TITLES = {
    "claim": "Engram - pure MoE: the claim",
    "lookup": "Engram - one row: the lookup",
    "path": "one row - same experts without table: the added path",
    "gate": "Engram - additive: gate and convolution",
    "additive": "additive - pure MoE",
    "alignment": "Engram - misaligned: whose rows they are",
    "learning": "Engram - frozen random table: what rows learn",
    "dense": "Engram - wider shared expert, at more FLOPs",
}
UNEQUAL = {"parameters": "no_table", "FLOPs": "wide_shared"}  # the controls outside the rule


def arms_table(results: dict) -> Table:
    """Sizes, costs and losses, an arm a row; the lowest loss is bold."""
    seeds = len(results["config"]["compare"]["seeds"])
    table = Table(title=f"test split, mean of {seeds} seed{'s' if seeds > 1 else ''}", title_justify="left")
    for name in (
        "arm",
        "params\nM",
        "with\nvocab",
        "table\nreachable",
        "MFLOPs\n/token",
        "lr",
        "test\nnats",
        "bits\n/byte",
        "CPU ms\n/token",
        "memory\npath",
        "peak\nMiB",
    ):
        table.add_column(name, justify="left" if name == "arm" else "right")
    best = min(arm["test_nats"] for arm in results["arms"].values())
    for name, arm in results["arms"].items():
        cost, loss = arm["cost"], f"{arm['test_nats']:.4f}"
        table.add_row(
            ARM_TITLES[name],
            f"{cost['total'] / 1e6:.3f}",
            f"{cost['total_with_vocabulary'] / 1e6:.3f}",
            f"{arm['reachable_table'] / 1e6:.3f}" if cost["table"] else "-",
            f"{cost['flops'] / 1e6:.3f}",
            f"{arm['lr']:.4f}",
            f"[bold]{loss}[/]" if arm["test_nats"] == best else loss,
            f"{arm['per_source']['all']['bits_per_byte']:.4f}",
            f"{arm['cpu_ms_per_token']:.3f}",
            f"{arm['memory_share']:.1%}" if cost["table"] else "-",
            f"{arm['peak_mib']:.0f}",
        )
    return table


def sources_table(results: dict) -> Table:
    """Bits per byte of each source, an arm a row."""
    sources = list(next(iter(results["arms"].values()))["per_source"])
    table = Table(title="bits per byte by source", title_justify="left")
    table.add_column("arm")
    for source in sources:
        table.add_column(source, justify="right")
    for name, arm in results["arms"].items():
        table.add_row(ARM_TITLES[name], *(f"{arm['per_source'][source]['bits_per_byte']:.4f}" for source in sources))
    return table


def readings_table(results: dict) -> Table:
    """The paired differences in nats with their intervals and verdicts; below zero, the first arm is better."""
    table = Table(title="paired differences in test loss, nats (below zero: the first is better)", title_justify="left")
    for name in ("reading", "mean", "95 % interval", "detectable", "by the rule"):
        table.add_column(name, justify="left" if name in ("reading", "by the rule") else "right")
    for name, reading in results["readings"].items():
        verdict = reading["verdict"]
        if name != "claim":
            verdict = {"memory wins": "lower", "memory loses": "higher"}.get(verdict, verdict)
        interval = "-" if reading["low"] is None else f"{reading['low']:+.4f} .. {reading['high']:+.4f}"
        detectable = "-" if reading["detectable"] is None else f"{reading['detectable']:.4f}"
        table.add_row(READING_TITLES[name], f"{reading['mean']:+.4f}", interval, detectable, verdict)
    return table


def print_results(results: dict, console: Console) -> None:
    """Tables, and what the trained rows hold."""
    seeds = results["config"]["compare"]["seeds"]
    tokens = next(iter(results["arms"].values()))["tokens"]
    passes = tokens / results["corpus"]["tokens"]["train"]
    console.print(
        f"\n[bold]{results['config']['name']}[/]: {tokens:,} training tokens, {passes:.2f} of one pass, seeds {seeds}"
    )
    arms = results["arms"]
    spreads = {
        "parameters": spread([arm["cost"]["total"] for name, arm in arms.items() if name != UNEQUAL["parameters"]]),
        "FLOPs": spread([arm["cost"]["flops"] for name, arm in arms.items() if name != UNEQUAL["FLOPs"]]),
    }
    told = (
        f"{what} within {share:.2%}{f' ({ARM_TITLES[UNEQUAL[what]]!r} aside)' if UNEQUAL[what] in arms else ''}"
        for what, share in spreads.items()
    )
    console.print(f"equal by construction: {', '.join(told)}", highlight=False)
    for table in (arms_table(results), sources_table(results), readings_table(results)):
        console.print(table)
    if "test_nats_permuted" in results["arms"].get("engram", {}):
        engram = results["arms"]["engram"]
        console.print(
            "Engram's trained table with its rows permuted at evaluation: "
            f"{engram['test_nats_permuted'] - engram['test_nats']:+.3f} nats. What the rows hold is what the model reads."
        )


def print_verdict(results: dict, console: Console, reference: dict | None) -> None:
    """The last lines: the verdict of these seeds, or of the committed ones with these beside them."""
    claim = results["readings"].get("claim")
    if claim is None:
        return
    if claim["low"] is not None:
        console.print(f"\n[bold]verdict: {claim['verdict']}[/] ({describe(claim)})")
        return
    console.print(f"\nthis run: {claim['mean']:+.4f} nats. Fewer than three seeds decide nothing.")
    if reference is None:
        console.print("Run more seeds: add compare.seeds=[0,1,2]")
        return
    committed = paired(reference["readings"]["claim"]["differences"]).to_dict()
    low, high = prediction_interval(committed["differences"])
    console.print(
        f"\nthe committed run of this preset ({len(committed['differences'])} seeds; {reference['environment']['date']}, "
        f"{reference['environment']['cpu']}):"
    )
    for name, reading in reference["readings"].items():
        console.print(f"  {READING_TITLES[name]}: {describe(reading)}", highlight=False)
    agrees = "agrees with it" if low <= claim["mean"] <= high else "DISAGREES with it"
    console.print(
        f"[bold]verdict of the committed seeds: {committed['verdict']}[/]; this run {agrees} "
        f"(one more seed was expected in {low:+.3f} .. {high:+.3f})"
    )


def describe(reading: dict) -> str:
    """`-0.0853 nats, 95 % interval -0.1010 .. -0.0690 over 3 seeds, detectable 0.0190`."""
    return (
        f"{reading['mean']:+.4f} nats, 95 % interval {reading['low']:+.4f} .. {reading['high']:+.4f} over "
        f"{len(reading['differences'])} seeds, detectable {reading['detectable']:.4f}"
    )


def spread(values: list[float]) -> float:
    """(largest - smallest) / smallest."""
    return (max(values) - min(values)) / min(values)


def draw(results: dict, out: Path) -> Path | None:
    """curves.png: training loss by tokens for each arm, and the paired differences. None where matplotlib is not installed."""
    plt = pyplot()
    if plt is None:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), constrained_layout=True)
    seeds = results["config"]["compare"]["seeds"]
    for index, arm in enumerate(results["arms"]):
        curves = [smooth_curve(out / f"{arm}-s{seed}" / "metrics.jsonl") for seed in seeds]
        tokens = curves[0][0]
        left.plot(
            tokens / 1e6,
            np.mean([loss for _, loss in curves], axis=0),
            label=ARM_TITLES[arm],
            color=f"C{index}",
            lw=1.4,
        )
    left.set(xlabel="training tokens (millions)", ylabel="training loss (nats, smoothed)")
    left.set_ylim(top=np.percentile(curves[0][1], 85))
    left.legend(frameon=False, fontsize=8)
    names = list(results["readings"])[::-1]
    for y, name in enumerate(names):
        reading = results["readings"][name]
        right.plot(reading["differences"], [y] * len(reading["differences"]), "o", color="0.6", ms=4)
        right.plot(reading["mean"], y, "D", color="C1", ms=6)
        if reading["low"] is not None:
            right.plot([reading["low"], reading["high"]], [y, y], color="C1", lw=2)
    right.axvline(0, color="0.3", lw=0.8)
    right.set_yticks(range(len(names)), [READING_TITLES[name].replace(": ", ":\n") for name in names], fontsize=7)
    right.set_xlabel("difference in test loss (nats); below zero: the first is better")
    path = out / "curves.png"
    return save_picture(figure, path)


def smooth_curve(path: Path, points: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and training loss of a metrics.jsonl, averaged within `points` equal spans."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    tokens, losses = (np.array([record[key] for record in records]) for key in ("tokens", "loss_nats"))
    spans = np.array_split(np.arange(len(records)), min(points, len(records)))
    return np.array([tokens[span].mean() for span in spans]), np.array([losses[span].mean() for span in spans])
