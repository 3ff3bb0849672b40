"""What the documents promise: commands that exist, links that lead somewhere, tables that are fresh, code that runs."""

import ast
import functools
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from nengram import cli
from nengram.config import load_config, to_toml
from nengram.errors import ConfigError
from nengram.study import paired

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("[!.]*/**/*.md"))]
PRESETS = sorted(path for path in (ROOT / "configs").rglob("*.toml") if path.stem != "sources")
SWEEPS = sorted((ROOT / "experiments").glob("*/sweep*.toml"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
GENERATED = re.compile(r"<!-- begin:[\w-]+ -->.*?<!-- end:[\w-]+ -->", re.S)
NOT_COMMITTED = ("data/facts", "data/factbook", "data/smollm2")  # what is fetched


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """A document without its code and its generated blocks."""
    return FENCED.sub("", GENERATED.sub("", read(path)))


def commands(path: Path) -> list[str]:
    """Every line of the `sh` blocks of a document, generated ones too."""
    return [
        line for kind, code in FENCED.findall(read(path)) if kind == "sh" for line in code.splitlines() if line.strip()
    ]


def mentioned(path: Path) -> list[str]:
    """Commands in running text; those with a word in capitals are patterns, not commands."""
    found = (" ".join(code.split()) for code in re.findall(r"`((?:make|nengram|python)\s[^`]+)`", prose(path)))
    return [line for line in found if not any(word.isupper() for word in line.split())]


COMMANDS = sorted({(name_of(path), line) for path in DOCUMENTS for line in (*commands(path), *mentioned(path))})


def test_readme_has_its_two_commands():
    assert {"make demo", "make test"} <= set(commands(ROOT / "README.md"))


@pytest.mark.parametrize(("document", "line"), COMMANDS)
def test_command_exists(document, line):
    check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "make tests",
        "make demo TORCH=x",
        "nengram trance text",
        "nengram trance",
        "nengram train demo --folder x",
        "nengram eval runs/first --control shuffled",
        "nengram train demo train.rate=0.1",
        "nengram compare dmeo",
        "python examples/my_trainer.py",
        "python -m nengram.adress.reference",
        "frobnicate",
    ],
)
def test_wrong_commands_are_seen(line):
    with pytest.raises((AssertionError, ConfigError)):
        check_command(line)


def check_command(line: str) -> None:
    """A shell line of a document: a make target, a verb with options that parse, a script or module that is there."""
    first, *rest = shlex.split(line)
    if first == "make":
        check_make(rest)
    elif first == "nengram" and " ".join(rest) in {*cli.VERBS, *cli.GROUPS, "--help"}:
        return
    elif first == "nengram":
        check_verb(rest)
    elif first == "python" and rest[0] == "-m":
        assert found(rest[1]), f"{line}: no module {rest[1]}"
    elif first == "python":
        assert (ROOT / rest[0]).is_file(), f"{line}: no file {rest[0]}"
    else:
        assert [first, *rest] == [".", ".venv/bin/activate"], f"{line}: not a command that this test knows"


def found(module: str) -> bool:
    """Whether `python -m module` would find something."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def check_make(arguments: list[str]) -> None:
    makefile = read(ROOT / "Makefile")
    for argument in arguments:
        variable, equals, _ = argument.partition("=")
        pattern = rf"^{re.escape(variable)} \?=" if equals else rf"^{re.escape(argument)}:"
        assert re.search(pattern, makefile, re.M), f"the Makefile has no {argument}"


def check_verb(arguments: list[str]) -> None:
    """Parse with the real signatures, run nothing; presets and overrides are read by `load_config`."""
    calls = []

    def stand_in(function):
        return functools.wraps(function)(lambda *given, **options: calls.append((function.__name__, given)))

    verbs = {name: stand_in(function) for name, function in cli.VERBS.items()}
    try:
        cli.choose(verbs, args=arguments, prog="nengram", console_outputs=False)
    except SystemExit:
        raise AssertionError(f"nengram {shlex.join(arguments)}: does not parse") from None
    (verb, given), *_ = calls
    if verb in ("compare", "train"):
        load_config(*given)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


def anchors(path: Path) -> set[str]:
    """The anchors that headings get."""
    headings = re.findall(r"^#+ (.+)$", read(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_that_documents_name_exist(path):
    """Paths in backticks that begin with a folder of the repository, or of the package."""
    tops = {folder.name for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")} - {"runs"}
    rooms = {folder.name for folder in (ROOT / "nengram").iterdir() if folder.is_dir()}
    missing = []
    for named in re.findall(r"`([\w./-]+/[\w./-]*)`", prose(path)):
        homes = [ROOT] * (named.split("/")[0] in tops) + [ROOT / "nengram"] * (named.split("/")[0] in rooms)
        if homes and not named.startswith(NOT_COMMITTED) and not any((home / named).exists() for home in homes):
            missing.append(named)
    assert not missing


@pytest.fixture(scope="module")
def docs():
    """scripts/docs.py as a module."""
    spec = importlib.util.spec_from_file_location("docs", ROOT / "scripts" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_blocks_are_fresh(docs):
    assert [name_of(path) for path in docs.documents() if docs.renewed(read(path)) != read(path)] == []


def test_blocks_are_replaced_and_mistakes_named(docs, monkeypatch):
    monkeypatch.setitem(docs.BLOCKS, "made-up", lambda: "new")
    marked = "a\n<!-- begin:{0} -->\nold\n<!-- end:{0} -->\nb\n"
    assert docs.renewed(marked.format("made-up")) == marked.format("made-up").replace("old", "new")
    with pytest.raises(SystemExit, match='no block is called "made-down".*made-up'):
        docs.renewed(marked.format("made-down"))
    with pytest.raises(SystemExit, match="lost its twin"):
        docs.renewed("<!-- begin:made-up -->\n")


def test_comparison_shows_what_the_file_holds(docs, monkeypatch, tmp_path):
    environment = {name: name for name in ("cpu", "cores", "threads", "system", "python", "torch", "numpy", "date")}
    arm = {
        "lr": 0.006,
        "tokens": 600_000,
        "cpu_ms_per_token": 0.3,
        "memory_share": 0.08,
        "peak_mib": 400.0,
        "reachable_table": 64,
    }
    cost = {"total": 3_458_176, "flops": 2_196_480, "table": 0}
    per_source = {name: {"nats": 4.5, "bits_per_byte": 1.875} for name in ("all", "glosses")}
    moe = arm | {"cost": cost, "test_nats": 4.7, "per_source": per_source}
    engram = arm | {
        "cost": cost | {"table": 1_180_264},
        "test_nats": 4.6,
        "test_nats_permuted": 5.6,
        "per_source": per_source,
    }
    readings = {"claim": paired([-0.09, -0.1, -0.11]).to_dict(), "lookup": paired([-0.2, -0.21, -0.22]).to_dict()}
    results = {
        "command": "nengram compare facts",
        "environment": environment,
        "config": {"compare": {"seeds": [0, 1, 2], "lr": {"engram": 0.006}}},
        "arms": {"moe": moe, "engram": engram},
        "readings": readings,
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "facts.results.json").write_text(json.dumps(results))
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    shown = docs.comparison("facts")
    assert "| pure MoE | 3.458 | - | 2.196 | 0.0060 | 4.7000 | 1.8750 | 0.300 | - |" in shown
    assert "| Engram | 3.458 | 0.000 | 2.196 | 0.0060 | **4.6000** | 1.8750 | 0.300 | 8.0 % |" in shown
    assert "| Engram - pure MoE: the claim | memory wins | -0.1000 | -0.1248 .. -0.0752 |" in shown
    assert "| Engram - one row: the lookup | lower | -0.2100 |" in shown
    assert "| bits a byte | all | glosses |" in shown
    assert (
        "`nengram compare facts`: 600,000 training tokens, seeds 0, 1, 2, 18 CPU-minutes" in shown
        and "+1.000 nats" in shown
    )
    assert "Learning rate NOT tuned for moe. " in shown
    assert "not yet measured" not in shown.lower() and "Not measured yet" in docs.comparison("demo")


def test_rules_table_shows_what_the_file_holds(docs, monkeypatch, tmp_path):
    environment = {name: name for name in ("cpu", "cores", "threads", "system", "python", "torch", "numpy", "date")}
    run = {"rule": "rowwise_adagrad", "multiplier": 2.5, "dev_nats": 4.61, "step_ms": 1.234, "state_bytes_per_row": 4.0}
    found = {
        "command": "python run.py",
        "environment": environment,
        "lr": 0.006,
        "tokens": 1000,
        "seed": 1000,
        "runs": [run],
    }
    (tmp_path / docs.RULES).parent.mkdir(parents=True)
    (tmp_path / docs.RULES).write_text(json.dumps(found))
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    assert "| rowwise_adagrad | 2.5 | **4.6100** | 1.23 | 4 |" in docs.rules()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    """Blocks of code run in their order in an empty folder; those made from a file are tested there, those that fetch are compiled."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, code in FENCED.findall(GENERATED.sub("", read(path))):
        if kind == "python":
            compiled = compile(ast.parse(code), name_of(path), "exec")
            if "fetch(" not in code:
                exec(compiled, names)
    assert not list(tmp_path.iterdir())


def test_every_dependency_is_defended():
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    rows = [
        line for line in read(ROOT / "docs" / "decisions" / "0002-dependencies.md").splitlines() if line.startswith("|")
    ]
    names = {re.split(r"[^\w-]", line)[0] for line in asked}
    assert {name for name in names if not any(re.search(rf"\b{name}\b", row) for row in rows)} == set()


def test_every_decision_is_on_the_tour():
    tour = read(ROOT / "docs" / "tour.md")
    assert [
        path.name for path in (ROOT / "docs" / "decisions").glob("*.md") if f"](decisions/{path.name})" not in tour
    ] == []


@pytest.mark.parametrize("path", SWEEPS, ids=name_of)
def test_every_sweep_of_an_experiment_can_be_read(path):
    config = load_config(path)
    assert config.sweep.grids and config.sweep.seeds
    for grid in config.sweep.grids:
        for key, values in grid.items():
            for value in values:
                config.replace(**{key.replace(".", "__"): value})


@pytest.mark.parametrize("path", PRESETS, ids=name_of)
def test_preset_loads_and_survives_writing(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "again.toml") == config
    assert load_config(path.relative_to(ROOT / "configs").with_suffix("").as_posix()) == config


@pytest.mark.slow
def test_trace_prints_what_the_readme_shows(capsys, monkeypatch, tmp_path):
    text = "Only Alexander the Great could tame the horse Bucephalus."
    shown = next(code for _, code in FENCED.findall(read(ROOT / "README.md")) if "rows in layer 1" in code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nengram", "trace", text])
    cli.main()
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in shown.splitlines() if line.rstrip() not in printed] == []
