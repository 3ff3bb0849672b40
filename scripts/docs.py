"""Whatever can drift is generated: tables of results, sizes, options and code stand in the documents between two marks

    <!-- begin:NAME -->
    <!-- end:NAME -->

and are made from committed files and from the code, never typed. `make docs` renews them all; `python scripts/docs.py --check` changes
nothing and exits with 1 when one is stale, which a test does at every run. A table whose results file does not exist says so.
"""

import ast
import dataclasses
import inspect
import io
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nengram import cli
from nengram.config import load_config
from nengram.conform.bugs import BUGS
from nengram.conform.classes import CLASS_BUGS
from nengram.errors import nearest
from nengram.files import write_atomic
from nengram.model import split_budget
from nengram.study import law_report
from nengram.study.gain_report import gain_tables
from nengram.study.plan_report import print_plan
from nengram.study.report import ARM_TITLES, READING_TITLES
from nengram.study.sweep_report import points_table
from nengram.study.twin import twin_table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed
from benchmarks.report import load_all, markdown_table  # noqa: E402

MARKED = re.compile(r"(<!-- begin:(?P<name>[\w-]+) -->\n).*?(<!-- end:(?P=name) -->)", re.S)
ROWS_FOR_TOKENS = "experiments/2026-11-22-rows-for-tokens/results.json"
CODEC_REPORTS = "experiments/2026-11-22-codecs"
RULES_TWO_TEXTS = "experiments/2026-11-22-update-rules-two-texts/results.json"
RETROFIT = "experiments/2026-11-26-retrofit/results.json"
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


def rules_two_texts() -> str:
    """Dev loss by table rate, a line for each text and rule, its best bold."""
    found = json.loads((ROOT / RULES_TWO_TEXTS).read_text(encoding="utf-8"))
    by_line: dict[tuple[str, str], dict[float, float]] = {}
    for run in found["runs"]:
        by_line.setdefault((run["text"], run["rule"]), {})[run["multiplier"]] = run["mean"]
    rates = sorted({rate for losses in by_line.values() for rate in losses})
    rows = []
    for (text, rule), losses in by_line.items():
        told = {rate: f"{nats:.3f}" for rate, nats in losses.items()}
        told[min(losses, key=losses.get)] = f"**{min(losses.values()):.3f}**"
        rows.append([text, rule, *(told.get(rate, "") for rate in rates)])
    seeds = sorted({seed for run in found["runs"] for seed in run["dev_nats"]})
    where = f"`{found['command']}`: dev nats, {found['dev_tokens']:,} tokens at most, seeds {', '.join(seeds)}. "
    table = markdown(["text", "rule", *(f"x{rate:g}" for rate in rates)], rows, left=2)
    return f"{table}\n\n{where}{machine(found['environment'])}"


def sweep(folder: str, title: str = "") -> str:
    """The report of a finished or unfinished sweep in experiments/: its law, where it has one, else its paired differences."""
    path = ROOT / "experiments" / folder / "sweep.json"
    if not path.exists():
        return f"*Not measured yet: `experiments/{folder}/sweep.json` does not exist.*"
    found = json.loads(path.read_text(encoding="utf-8"))
    law = found.get("law", {})
    tables = law_report.tables(law) if law.get("curves") or law.get("rows") else [points_table(found["differences"])]
    chosen = [table for table in tables if title in str(table.title)]
    return "\n\n".join([*map(from_rich, chosen), f"`{found['command']}`. {machine(found['environment'])}"])


def retrofit() -> str:
    """Arms of the retrofit into a pretrained model: text learnt, text forgotten, facts recalled."""
    found = _retrofit_results()
    if found is None:
        return f"*Not measured yet: {RETROFIT} does not exist.*"
    header = [
        "arm",
        "parameters",
        "rate",
        "learnt text",
        "prose",
        "code",
        "shown, near",
        "exact",
        "shown, far",
        "never shown",
    ]
    rows = []
    for name, arm in found["arms"].items():
        nats = [f"{arm['measures'][key]:.3f}" for key in ("learnt text", "enwiki", "stdlib")]
        asked = ("known, near: wrong", "known, near: not exact", "known, far: wrong", "never, near: wrong")
        right = [f"{1 - arm['measures'][key]:.0%}" for key in asked]
        rows.append([f"`{name}`", f"{arm['parameters']['total']:,}", f"{arm['lr']:g}", *nats, *right])
    seeds = ", ".join(map(str, max((arm["seeds"] for arm in found["arms"].values()), key=len)))
    told = f"`{found['command']}`: {found['tokens']:,} tokens a run, seeds {seeds}. "
    told += "".join(
        f"`{arm}` keeps {share:.0%} of the graft's gain on learnt text. " for arm, share in found["kept"].items()
    )
    return (
        f"{markdown(header, rows)}\n\n{told}{machine(found['environments'][-1] | {'date': ', '.join(found['dates'])})}"
    )


def retrofit_differences() -> str:
    """Its paired differences, of the measures that its questions ask for."""
    found = _retrofit_results()
    if found is None:
        return ""
    asked = {"learnt text": "learnt text", "enwiki": "prose", "stdlib": "code"}
    asked |= {f"known - never, {form}: nats": f"recall, {form}" for form in ("near", "far")}
    rows = [
        [f"`{title}`", *(_interval(reading.get(key)) for key in asked)] for title, reading in found["readings"].items()
    ]
    return markdown(["nats", *asked.values()], rows)


def graft_rates() -> str:
    """Dev nats of a graft by its layer's rate and its table's, the best bold; and what biases change at some of them."""
    path = ROOT / "experiments/2026-11-26-retrofit/rates.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    nats, biased = (
        {(row["lr"], row["table_lr"]): row["dev_nats"] for row in rows if row["bias"] == bias and not row["lora_lr"]}
        for bias in (False, True)
    )
    across = sorted({table_lr for _, table_lr in nats})
    cells = {
        pair: f"**{value:.3f}**" if value == min(nats.values()) else f"{value:.3f}" for pair, value in nats.items()
    }
    grid = [
        [f"{lr:g}", *(cells.get((lr, table_lr), "") for table_lr in across)] for lr in sorted({lr for lr, _ in nats})
    ]
    gains = [f"{nats[pair] - biased[pair]:+.3f} at lr {pair[0]:g}, tables {pair[1]:g}" for pair in sorted(biased)]
    table = markdown(["lr", *(f"tables {table_lr:g}" for table_lr in across)], grid)
    return f"{table}\n\nGained by biases in the layer's projections, zero at the start (`--bias`): {'; '.join(gains)}."


def _retrofit_results() -> dict | None:
    path = ROOT / RETROFIT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _interval(value: dict | None) -> str:
    if value is None or value["low"] is None:
        return ""
    whole = f"{value['mean']:+.3f} ({value['low']:+.3f} .. {value['high']:+.3f})"
    return f"**{whole}**" if value["low"] > 0 or value["high"] < 0 else whole


def gain() -> str:
    """Where the gain lives, of experiments/2026-11-22-history."""
    path = ROOT / "experiments" / "2026-11-22-history" / "gain.json"
    if not path.exists():
        return "*Not measured yet: `experiments/2026-11-22-history/gain.json` does not exist.*"
    return "\n\n".join(map(from_rich, gain_tables(json.loads(path.read_text(encoding="utf-8")))))


def from_rich(table: Table) -> str:
    """A table of the terminal in Markdown: title, cells without their markup, caption."""

    def plain(cell: str) -> str:
        words = Text.from_markup(str(cell))
        text = words.plain.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
        return f"**{text}**" if words.spans and text else text

    header = [plain(column.header) for column in table.columns]
    rule = ["---" if column.justify == "left" else "---:" for column in table.columns]
    rows = zip(*([plain(cell) for cell in column.cells] for column in table.columns), strict=True)
    lines = [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
    parts = (plain(table.title or ""), "\n".join(lines), plain(table.caption or ""))
    return "\n\n".join(part for part in parts if part)


def plan() -> str:
    """What `nengram plan` prints for the plan in docs/plan.json."""
    console = Console(width=140, record=True, file=io.StringIO())
    print_plan(json.loads((ROOT / "docs" / "plan.json").read_text(encoding="utf-8")), console)
    lines = (line.rstrip() for line in console.export_text().strip().splitlines())
    return "```text\n" + "\n".join(lines) + "\n```"


def rows_for_tokens() -> str:
    """Predicted and counted: distinct n-grams, rows touched, rows read 8 times; and dev loss by rows where it was measured."""
    path = ROOT / ROWS_FOR_TOKENS
    if not path.exists():
        return "*Not measured yet: the experiment has no results.json.*"
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            one["text"],
            f"{one['tokens']:,}",
            f"1/{round(one['tokens'] / one['known'])}",
            str(one["order"]),
            f"{one['distinct_error']:+.1%}".replace("%", " %"),
            f"{one['rows']:,}",
            *(" / ".join(f"{share:.1%}".replace("%", " %") for share in one[name]) for name in ("touched", "taught")),
        ]
        for one in found["predictions"]
    ]
    header = ["text", "tokens", "known", "order", "n-grams, error", "rows recommended", "touched: predicted / census"]
    tables = [markdown([*header, "read 8 times: predicted / census"], rows)]
    pilot = (
        [f"{one['rows']:,}", str(one["order"]), f"{one['touched']:.1%}", f"{one['taught']:.1%}"]
        for one in found["pilot"]
    )
    tables.append(markdown(["rows a head in the pilot", "order", "touched", "read 8 times or more"], pilot))
    if found["losses"]:
        sizes = ([f"x{one['times']:g}", str(one["rows_per_head"]), f"{one['dev_nats']:.4f}"] for one in found["losses"])
        tables.append(markdown(["of the recommendation", "rows a head", "dev nats"], sizes))
    return "\n\n".join([*tables, f"`{found['command']}`. {machine(found['environment'])}"])


def speed() -> str:
    """The ratios of benchmarks/results that have a goal; benchmarks/README.md has them all."""
    folder = ROOT / "benchmarks" / "results"
    found = load_all(folder, sorted(path.stem for path in folder.glob("*.json")))
    with_goals = [one | {"figures": [figure for figure in one["figures"] if figure["goal"]]} for one in found]
    return markdown_table(with_goals) if found else "*Not measured yet: `make bench`.*"


def table_benchmarks() -> str:
    """The figures of the benchmarks about tables, goals or not."""
    return markdown_table(load_all(ROOT / "benchmarks" / "results", ("gather", "disk", "serving")))


def table_tools() -> str:
    """Time and peak memory of the verbs that stream."""
    return markdown_table(load_all(ROOT / "benchmarks" / "results", ("table_tools",)))


def codecs() -> str:
    """Error of a row and loss of a trained model under every codec, of experiments/2026-11-22-codecs."""
    paths = sorted((ROOT / CODEC_REPORTS).glob("*/codecs.json"))
    if not paths:
        return "*Not measured yet: the experiment has no results.*"
    return "\n\n".join(codec_table(json.loads(path.read_text(encoding="utf-8"))) for path in paths)


def codec_table(found: dict) -> str:
    """One trained run under every codec: size, error of a row, and loss against its own table."""
    rows, width = [], 0
    for name, one in found["codecs"].items():
        table = next(iter(one["tables"].values()))
        width = table["codec"]["row_width"]
        rms = (f"{table['rms_relative_error'][share]:.2%}".replace("%", " %") for share in ("median", "p99"))
        loss = f"{one['difference']:+.5f}", f"{one['standard_error']:.5f}"
        rows.append([name, str(one["row_bytes"]), f"{one['table_bytes'] / 2**20:.2f}", *rms, *loss])
    header = ["codec", "bytes a row", "MiB", "rms error of a row, median", "p99", "loss, nats", "standard error"]
    told = (
        f"Rows of {width} numbers; {found['nats']:.4f} nats on {found['tokens']:,} tokens of {found['split']} with the table as "
        f"trained, differences against that, paired by token. {machine(found['environment'])}"
    )
    return f"{markdown(header, rows)}\n\n{told}"


def state() -> str:
    """Every situation of docs/state.json in every dialect: a cell says what differs, if anything does."""
    found = json.loads((ROOT / "docs" / "state.json").read_text(encoding="utf-8"))
    rows = [
        [situation, *(f"rows {one['rows']}, outputs {one['outputs']}" for one in cells.values())]
        for situation, cells in found["cells"].items()
    ]
    positions = sum(one["positions"] for cells in found["cells"].values() for one in cells.values())
    dialects = next(iter(found["cells"].values()))
    table = markdown(["situation", *dialects], rows, left=1 + len(dialects))
    told_by = f"`{found['command']}`: {positions:,} positions compared, outputs in float64 to {found['tolerance']:g}."
    return f"{table}\n\n{told_by}"


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
    """Every verb with its options, from the functions of nengram/cli/."""
    return "\n\n".join(verb_section(name, function) for name, function in cli.VERBS.items())


def verb_section(name: str, function: Callable) -> str:
    """One verb: usage, what it does, its arguments."""
    summary, _, arguments = inspect.getdoc(function).partition("\nArgs:\n")
    lines = (line.partition(":") for line in textwrap.dedent(arguments).splitlines())
    told = {argument: text.strip() for argument, _, text in lines}
    usage, rows = f"nengram {name}", []
    for parameter in inspect.signature(function).parameters.values():
        if dataclasses.is_dataclass(parameter.default):
            rows += grouped_options(type(parameter.default))
            continue
        positional = parameter.kind is parameter.POSITIONAL_ONLY
        shown, default = parameter.name.upper() if positional else f"--{parameter.name.replace('_', '-')}", ""
        if positional:
            usage += f" {shown}" if parameter.default is parameter.empty else f" [{shown}]"
        if parameter.default not in (parameter.empty, (), None, "", False):
            default = f"`{parameter.default}`"
        rows.append([f"`{shown}`", told[parameter.name].replace("<", r"\<"), default])
    return f"## {name}\n\n```\n{usage}\n```\n\n{summary.strip()}\n\n{markdown(['', 'what', 'default'], rows, left=3)}"


def grouped_options(kind: type) -> list[list[str]]:
    """The options that a dataclass adds to a verb: its fields, and the sentence under each."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    pairs = zip(body, body[1:], strict=False)
    told = {field.target.id: text.value.value for field, text in pairs if isinstance(field, ast.AnnAssign)}
    rows = []
    for field in dataclasses.fields(kind):
        default = f"`{field.default}`" if field.default not in (None, "", False) else ""
        rows.append([f"`--{field.name.replace('_', '-')}`", told[field.name], default])
    return rows


def conformance() -> str:
    """Every implementation that was asked: what it passed in each dialect, its first difference, what it looks like, and when."""
    paths = sorted((ROOT / "docs" / "conformance").glob("*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rows, told, lines = [], [], []
    for found in results:
        name = f"{found['implementation']['name']} {found['implementation']['version']}"
        asked = {dialect: one for dialect, one in found["dialects"].items() if one["asked"]}
        for dialect, one in asked.items():
            shares = f"{one['row_numbers_right']:,} of {one['row_numbers_compared']:,}"
            rows.append([name, dialect, *one["by_kind"].values(), str(one["not_offered"]), shares])
            if one["differs"]:
                told.append(
                    f"- {name}, {dialect}: {one['guess'] or 'no known bug'}. {_first_difference(one['first_difference'])}"
                )
        lines.append(
            f"{found['line']}\n  {found['command']}; Python {found['python']}, {found['system']}, {found['date']}"
        )
    header = [
        "implementation",
        "dialect",
        "rows",
        "numbers",
        "classes",
        "questions not offered",
        "single row numbers right",
    ]
    text = "```text\n" + "\n".join(lines) + "\n```"
    return "\n\n".join([markdown(header, rows, left=2), "\n".join(told), text])


def _first_difference(outcome: dict) -> str:
    """Where the first wrong answer is."""
    found = outcome["difference"]
    place = ", ".join(f"{name} {value}" for name, value in found["place"].items())
    where = f'setting "{outcome["setting"]}", "{outcome["case"]}", {place}'
    return f"First difference: {where}: {found['got']} instead of {found['expected']}."


def known_bugs() -> str:
    """The names that a guess can give."""
    ways = [[bug, str(len(changes))] for bug, changes in BUGS.items()]
    return markdown(["bug", "ways to have it"], [*ways, *([bug, "1"] for bug in CLASS_BUGS)])


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
    "demo": lambda: comparison("demo"),
    "speed": speed,
    "law": lambda: sweep("2026-11-22-law"),
    "law-losses": lambda: sweep("2026-11-22-law", "loss over rho"),
    "controls": lambda: sweep("2026-11-22-law", "controls"),
    "rows": lambda: sweep("2026-11-22-rows"),
    "components": lambda: sweep("2026-11-22-components"),
    "second-pass": lambda: sweep("2026-11-22-second-pass"),
    "bytes": lambda: sweep("2026-11-22-bytes"),
    "gain": gain,
    "graft-rates": graft_rates,
    "retrofit": retrofit,
    "retrofit-differences": retrofit_differences,
    "twin": twin_table,
    "rules": rules,
    "rules-two-texts": rules_two_texts,
    "table-benchmarks": table_benchmarks,
    "table-tools": table_tools,
    "codecs": codecs,
    "plan": plan,
    "rows-for-tokens": rows_for_tokens,
    "sizes": sizes,
    "state": state,
    "conformance": conformance,
    "known-bugs": known_bugs,
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
