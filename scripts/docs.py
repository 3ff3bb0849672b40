"""Whatever can drift is generated: tables of results, sizes, options and code stand in the documents between two marks

    <!-- begin:NAME -->
    <!-- end:NAME -->

and are made from committed files and from the code, never typed. `make docs` renews them all; `python scripts/docs.py --check` changes
nothing and exits with 1 when one is stale, which a test does at every run. A table whose results file does not exist says so.
"""

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from nengram import cli
from nengram.config import load_config
from nengram.errors import nearest
from nengram.files import write_atomic
from nengram.model import split_budget
from nengram.study.report import ARM_TITLES, READING_TITLES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed
from benchmarks.report import load_all, markdown_table  # noqa: E402

MARKED = re.compile(r"(<!-- begin:(?P<name>[\w-]+) -->\n).*?(<!-- end:(?P=name) -->)", re.S)
RULES = "experiments/2026-11-22-update-rules/results.json"


def documents() -> list[Path]:
    """Every document that may hold a generated block."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str) -> str:
    """A document with every block made anew. Exits with a line that names a block nobody makes, or a mark without its twin."""

    def block(match: re.Match) -> str:
        name = match["name"]
        if name not in BLOCKS:
            sys.exit(f'no block is called "{name}"{nearest(name, BLOCKS)}; there are {", ".join(BLOCKS)}')
        return f"{match[1]}{BLOCKS[name]().strip()}\n{match[3]}"

    found = MARKED.findall(text)
    if not text.count("<!-- begin:") == text.count("<!-- end:") == len(found):
        sys.exit("a mark has lost its twin: every <!-- begin:NAME --> needs its <!-- end:NAME -->")
    return MARKED.sub(block, text)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others numbers."""
    names = list(header)
    rule = ["---"] * left + ["---:"] * (len(names) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rule, *map(list, rows)))


def comparison(preset: str) -> str:
    """The head-to-head of configs/<preset>.results.json: arms, readings, sources, and where the numbers come from."""
    path = ROOT / "configs" / f"{preset}.results.json"
    if not path.exists():
        return f"*Not measured yet: `configs/{preset}.results.json` does not exist.*"
    results = json.loads(path.read_text(encoding="utf-8"))
    return "\n\n".join((arms_table(results), readings_table(results), sources_table(results), provenance(results)))


def arms_table(results: dict) -> str:
    """Sizes, costs and test loss; the lowest loss is bold."""
    header = ["arm", "parameters, M", "reachable table, M", "MFLOPs a token", "lr", "test nats", "bits a byte"]
    best = min(arm["test_nats"] for arm in results["arms"].values())
    rows = []
    for name, arm in results["arms"].items():
        cost, loss, has_table = arm["cost"], f"{arm['test_nats']:.4f}", arm["cost"]["table"] > 0
        rows.append(
            [
                ARM_TITLES[name],
                f"{cost['total'] / 1e6:.3f}",
                f"{arm['reachable_table'] / 1e6:.3f}" if has_table else "-",
                f"{cost['flops'] / 1e6:.3f}",
                f"{arm['lr']:.4f}",
                f"**{loss}**" if arm["test_nats"] == best else loss,
                f"{arm['per_source']['all']['bits_per_byte']:.4f}",
                f"{arm['cpu_ms_per_token']:.3f}",
                f"{arm['memory_share']:.1%}".replace("%", " %") if has_table else "-",
            ]
        )
    return markdown([*header, "CPU ms a token", "memory path"], rows)


def readings_table(results: dict) -> str:
    """Paired differences with intervals and verdicts; the words of the rule belong to the claim alone."""
    rows = []
    for name, reading in results["readings"].items():
        word = reading["verdict"]
        if name != "claim":
            word = {"memory wins": "lower", "memory loses": "higher"}.get(word, word)
        interval = "-" if reading["low"] is None else f"{reading['low']:+.4f} .. {reading['high']:+.4f}"
        detectable = "-" if reading["detectable"] is None else f"{reading['detectable']:.4f}"
        rows.append([READING_TITLES[name], word, f"{reading['mean']:+.4f}", interval, detectable])
    return markdown(
        ["difference in test loss, nats", "by the rule", "mean", "95 % interval", "detectable"], rows, left=2
    )


def sources_table(results: dict) -> str:
    """Bits per byte of every source."""
    sources = list(next(iter(results["arms"].values()))["per_source"])
    rows = (
        [ARM_TITLES[name], *(f"{arm['per_source'][source]['bits_per_byte']:.4f}" for source in sources)]
        for name, arm in results["arms"].items()
    )
    return markdown(["bits a byte", *sources], rows)


def provenance(results: dict) -> str:
    """Command, amount of text and time, machine and date: all from the file."""
    arms, config = results["arms"], results["config"]
    tokens, seeds = next(iter(arms.values()))["tokens"], config["compare"]["seeds"]
    minutes = sum(arm["cpu_ms_per_token"] * arm["tokens"] for arm in arms.values()) * len(seeds) / 60_000
    told = f"{tokens:,} training tokens, seeds {', '.join(map(str, seeds))}, {minutes:.0f} CPU-minutes of training"
    line = f"`{results['command']}`: {told}. "
    engram = arms.get("engram", {})
    if "test_nats_permuted" in engram:
        worse = engram["test_nats_permuted"] - engram["test_nats"]
        line += f"The trained table with its rows permuted: {worse:+.3f} nats. "
    untuned = [name for name in arms if name not in config["compare"]["lr"]]
    if untuned:
        line += f"Learning rate NOT tuned for {', '.join(untuned)}. "
    return line + machine(results["environment"])


def machine(environment: dict[str, str]) -> str:
    """Hardware, versions and date in one sentence."""
    return "{cpu}, {cores} cores, threads {threads}; {system}, Python {python}, torch {torch}, numpy {numpy}; {date}.".format(
        **environment
    )


def rules() -> str:
    """Dev loss of each table update rule at each rate, and what a step and a row cost."""
    if not (ROOT / RULES).exists():
        return "*Not measured yet: the experiment named above has no results.json.*"
    found = json.loads((ROOT / RULES).read_text(encoding="utf-8"))
    best = min(run["dev_nats"] for run in found["runs"])
    rows = [
        [
            run["rule"],
            f"{run['multiplier']:g}",
            f"**{run['dev_nats']:.4f}**" if run["dev_nats"] == best else f"{run['dev_nats']:.4f}",
            f"{run['step_ms']:.2f}",
            f"{run['state_bytes_per_row']:g}",
        ]
        for run in found["runs"]
    ]
    header = ["rule", "multiplier", "dev nats", "update, CPU ms", "state, bytes a row"]
    told = f"`{found['command']}`: base rate {found['lr']:g}, {found['tokens']:,} tokens, seed {found['seed']}. "
    return f"{markdown(header, rows)}\n\n{told}{machine(found['environment'])}"


def speed() -> str:
    """The ratios of benchmarks/results that have a goal; benchmarks/README.md has them all."""
    folder = ROOT / "benchmarks" / "results"
    found = load_all(folder, sorted(path.stem for path in folder.glob("*.json")))
    with_goals = [one | {"figures": [figure for figure in one["figures"] if figure["goal"]]} for one in found]
    return markdown_table(with_goals) if found else "*Not measured yet: `make bench`.*"


def sizes() -> str:
    """What `split_budget` makes of the demo's dials, arm by arm; all arms, whether the demo runs them or not."""
    config = load_config("demo")
    budget, rows = config.budget, []
    for arm, title in ARM_TITLES.items():
        split = split_budget(
            budget.scale,
            budget.rho,
            vocab_size=config.data.vocab_size,
            arm=arm,
            model=config.model,
            memory=config.memory,
        )
        cost, nominal = split.cost, split.memory.rows_per_head if split.memory.kind != "none" else ()
        numbers = (split.model.experts, split.model.shared_width, *nominal[:1], cost.table, cost.active, cost.total)
        cells = [f"{number:,}" for number in numbers]
        if not nominal:
            cells.insert(2, "-")
        rows.append([title, *cells, f"{cost.flops:,}", f"{cost.memory_flops:,}"])
    header = [
        "arm",
        "experts a block",
        "shared width",
        "rows a head",
        "table",
        "active",
        "total",
        "FLOPs a token",
        "of these, memory",
    ]
    return markdown(header, rows)


def options() -> str:
    """Every verb with its options, from the functions of nengram/cli.py."""
    return "\n\n".join(verb_section(name, function) for name, function in cli.VERBS.items())


def verb_section(name: str, function: Callable) -> str:
    """One verb: usage, what it does, its arguments."""
    summary, _, arguments = inspect.getdoc(function).partition("\nArgs:\n")
    lines = (line.partition(":") for line in textwrap.dedent(arguments).splitlines())
    told = {argument: text.strip() for argument, _, text in lines}
    usage, rows = f"nengram {name}", []
    for parameter in inspect.signature(function).parameters.values():
        positional = parameter.kind is parameter.POSITIONAL_ONLY
        shown, default = parameter.name.upper() if positional else f"--{parameter.name.replace('_', '-')}", ""
        if positional:
            usage += f" {shown}" if parameter.default is parameter.empty else f" [{shown}]"
        if parameter.default not in (parameter.empty, (), None, "", False):
            default = f"`{parameter.default}`"
        rows.append([f"`{shown}`", told[parameter.name].replace("<", r"\<"), default])
    return f"## {name}\n\n```\n{usage}\n```\n\n{summary.strip()}\n\n{markdown(['', 'what', 'default'], rows, left=3)}"


def example() -> str:
    """The heart of examples/own_trainer.py: its paragraphs on nengram, and the lines of the forward pass between them."""
    source = (ROOT / "examples" / "own_trainer.py").read_text(encoding="utf-8")
    paragraphs = re.split(r"\n\n+", source)
    chosen = [next(text for text in paragraphs if mark in text) for mark in ("\nfrom nengram.memory", "# 1.", "# 2.")]
    lines = source.splitlines()
    third = next(number for number, line in enumerate(lines) if "# 3." in line)
    forward = textwrap.dedent("\n".join(lines[third : third + 2]))
    return "```python\n" + "\n\n".join([*chosen[:2], f"...  # in the forward pass\n{forward}", chosen[2]]) + "\n```"


BLOCKS: dict[str, Callable[[], str]] = {
    "head-to-head": lambda: comparison("facts"),
    "demo": lambda: comparison("demo"),
    "speed": speed,
    "rules": rules,
    "sizes": sizes,
    "options": options,
    "example": example,
}


def main() -> int:
    """Renew every block, or with --check say which documents are stale: the exit code is 1 if any is."""
    stale = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        fresh = renewed(text)
        if fresh != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv[1:]:
                write_atomic(path, fresh)
    if stale:
        print(f"{'stale, run make docs' if '--check' in sys.argv[1:] else 'renewed'}: {', '.join(stale)}")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
