"""The house holds its own rules: who may import whom, what a room offers, what no file may do.

Every rule reads the syntax tree, so an import inside a function, under TYPE_CHECKING or written with dots counts like any other. Each
rule is a function of source text, and the planted cases beside it prove that it would find what it looks for.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nengram"
IN_PACKAGE = sorted(PACKAGE.rglob("*.py"))
EVERYWHERE = sorted(
    path
    for folder in ("nengram", "scripts", "examples", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in IN_PACKAGE}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))

# The order in which data flows. A room may import what stands on an earlier line; rooms on one line do not know each other.
LEVELS = (
    {"errors", "shapes"},
    {"files", "config"},
    {"text", "address", "store"},
    {"memory"},
    {"model"},
    {"train", "infer"},
    {"study", "conform"},
    {"hf"},
    {"cli"},
)
SEPARABLE = {
    "errors",
    "shapes",
    "files",
    "config",
    "address",
    "store",
    "memory",
}  # an Engram layer is lifted out with these alone
OUTSIDE = {"benchmarks", "experiments", "examples", "scripts", "tests"}
FETCHERS = ("text/fetch.py", "text/archive.py")
DOORS = {  # what only these files import
    "transformers": ("hf",),
    "vllm": ("hf",),
    "peft": ("hf",),
    "lm_eval": ("hf",),
    "matplotlib": ("study",),
    "numba": (
        "address/kernels.py",
        "store/kernels.py",
        "store/row_kernels.py",
        "store/gather.py",
        "store/decode.py",
        "store/page_reads.py",
    ),
    "llvmlite": ("address/kernels.py", "store/gather.py"),
    "tarfile": FETCHERS,
    "zipfile": FETCHERS,
    "shutil.unpack_archive": FETCHERS,
    "subprocess": (*FETCHERS, "study/processes.py", "conform/protocol.py"),
}
UNPICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch.load",
    "torch.save",
}
HEAVY = {"transformers", "matplotlib", "numba"}


def imports(tree: ast.Module, module: str = "", is_front: bool = False) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in the file; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = module.split(".")[: len(module.split(".")) - node.level + is_front] if node.level else []
            origin = ".".join([*up, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


@cache
def imports_of(path: Path) -> set[str]:
    """`imports` of a file of the repository."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return set(imports(tree_of(path), module, path.name == "__init__.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room_of(dotted: str) -> str:
    """The room or leftmost module that `nengram.<room>...` names; a name of the package's front is its room's."""
    name = dotted.split(".")[1]
    if f"nengram.{name}" in MODULES or any(name in level for level in LEVELS):
        return name
    import nengram

    return nengram._ROOM.get(name, name)


def may_import(room: str) -> set[str]:
    """What the law allows a room."""
    level = next((i for i, rooms in enumerate(LEVELS) if room in rooms), None)
    assert level is not None, f"nengram/{room} is in no level of the import law"
    allowed = {room}.union(*LEVELS[:level])
    return allowed & SEPARABLE if room in SEPARABLE else allowed


def unlawful(room: str, imported: set[str]) -> set[str]:
    """Imports that the law forbids to a file of `room`."""
    known = {name for name in imported if name.startswith("nengram.")}
    return {name for name in known if room_of(name) not in may_import(room)} | {
        name for name in imported if name == "nengram"
    }


def broken(rule: Callable[[Path], object], paths: list[Path]) -> dict[str, object]:
    """What a rule finds, by file."""
    return {path.relative_to(ROOT).as_posix(): found for path in paths if (found := rule(path))}


def test_import_law():
    def rule(path: Path) -> set[str]:
        return unlawful(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), imports_of(path))

    assert broken(rule, [path for path in IN_PACKAGE if path != PACKAGE / "__init__.py"]) == {}


def test_package_knows_nothing_of_the_folders_around_it():
    assert broken(lambda path: {name for name in imports_of(path) if name.split(".")[0] in OUTSIDE}, IN_PACKAGE) == {}
    assert broken(lambda path: under(imports_of(path), {"experiments"}), EVERYWHERE) == {}


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("store", "def f():\n    from nengram.address import AddressSpec"),
        ("address", "if TYPE_CHECKING:\n    import nengram.text.pack"),
        ("train", "from nengram import infer"),
        ("infer", "class A:\n    def f(self):\n        import nengram.train.loop as loop"),
        ("memory", "from nengram.text import prepare"),
        ("model", "from nengram import RowOptimizer"),
        ("files", "from .config import Config"),
        ("errors", "from . import files"),
        ("text", "from ..store import rules"),
        ("study", "import nengram"),
    ],
)
def test_import_law_sees_every_way_to_import(room, source):
    module = f"nengram.{room}" if room in ("files", "errors") else f"nengram.{room}.file"
    assert unlawful(room, set(imports(ast.parse(source), module)))


def test_import_law_allows_what_flows():
    assert not unlawful(
        "study",
        {"nengram.text.prepare", "nengram.memory.Engram", "nengram.train.loop.train", "nengram.errors", "torch"},
    )
    assert may_import("memory") == SEPARABLE
    assert set(ROOMS) | {path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"} <= set().union(*LEVELS)


def test_front_imports_rooms_only_on_demand():
    """`nengram/__init__.py` and the command line name rooms under TYPE_CHECKING or inside functions, never at import."""
    for file in (PACKAGE / "__init__.py", *(PACKAGE / "cli").glob("*.py")):
        at_import = ast.Module(
            [node for node in tree_of(file).body if isinstance(node, (ast.Import, ast.ImportFrom))], []
        )
        assert {room_of(name) for name in imports(at_import) if name.startswith("nengram.")} <= {
            "cli",
            "errors",
            "config",
        }, file


def test_only_fronts_import_by_a_name_made_at_run_time():
    """`import_module(name)` would slip past the import law; only the lazy fronts of rooms have it."""
    assert broken(by_name, [path for path in IN_PACKAGE if path.name != "__init__.py"]) == {}
    assert broken(by_name, [PACKAGE / "__init__.py"])


def by_name(path: Path) -> set[str]:
    """How a file imports by a name made at run time, if it does."""
    called = {ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)}
    return called & {"import_module", "__import__", "exec", "eval"} | under(imports_of(path), {"importlib", "runpy"})


def test_hard_dependencies_stay_behind_their_doors():
    assert broken(lambda path: trespasses(path.relative_to(PACKAGE).as_posix(), imports_of(path)), IN_PACKAGE) == {}


@pytest.mark.parametrize(
    ("file", "imported"),
    [
        ("model/transformer.py", "transformers.AutoModel"),
        ("text/render.py", "zipfile"),
        ("study/processes.py", "tarfile.open"),
        ("text/corpus.py", "subprocess.run"),
        ("address/hashing.py", "numba.njit"),
        ("train/loop.py", "matplotlib.pyplot"),
    ],
)
def test_doors_are_watched(file, imported):
    assert trespasses(file, {imported})


def trespasses(file: str, imported: set[str]) -> set[str]:
    """Imports that belong behind another door: a file of the package, as its path inside, and what it imports."""
    elsewhere = [
        kind for kind, homes in DOORS.items() if not any(file == home or file.startswith(f"{home}/") for home in homes)
    ]
    return under(imported, set(elsewhere))


def test_nothing_is_pickled():
    assert broken(lambda path: pickling(tree_of(path)), EVERYWHERE) == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from torch import load",
        "import torch\nx = torch.load(p)",
        "torch.save(x, p)",
        "np.load(p, allow_pickle=True)",
        "import shelve as s",
    ],
)
def test_pickling_is_seen(source):
    assert pickling(ast.parse(source))


def pickling(tree: ast.Module) -> set[str]:
    """Every unpickler that a file imports or calls."""
    found = under(set(imports(tree)), UNPICKLERS)
    found |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & UNPICKLERS
    trusting = (node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "allow_pickle")
    return found | {
        "allow_pickle" for node in trusting if not (isinstance(node.value, ast.Constant) and node.value.value is False)
    }


def under(imported: set[str], names: set[str]) -> set[str]:
    """The imports that are one of `names` or lie below one."""
    return {one for one in imported for name in names if one == name or one.startswith(f"{name}.")}


def test_files_compile():
    assert broken(lambda path: compile(tree_of(path), str(path), "exec") is None, EVERYWHERE) == {}


def test_files_open_with_their_argument():
    assert broken(lambda path: tree_of(path).body and not ast.get_docstring(tree_of(path)), EVERYWHERE) == {}


def test_no_file_is_named_for_what_does_not_fit_elsewhere():
    grab_bags = {"util", "utils", "common", "helper", "helpers", "misc", "shared"}
    assert broken(lambda path: path.stem.strip("_") in grab_bags, EVERYWHERE) == {}


@pytest.mark.parametrize("front", ["nengram", *(f"nengram.{room}" for room in ROOMS)])
def test_all_is_exact(front):
    """Every name of `__all__` exists, and whatever a front binds from its room, or defines without an underscore, is in it."""
    module = importlib.import_module(front)
    listed = getattr(module, "__all__", [])
    assert listed and len(listed) == len(set(listed))
    assert not [name for name in listed if not hasattr(module, name)]
    assert offered(tree_of(Path(module.__file__))) == {name for name in listed if name != "__version__"}


def offered(tree: ast.Module) -> set[str]:
    """Public names a front takes from nengram (TYPE_CHECKING included, for lazy fronts) or defines itself."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("nengram")):
            names |= {alias.asname or alias.name for alias in node.names}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_offered_sees_lazy_and_defined_names():
    source = "if TYPE_CHECKING:\n    from nengram.store import Ticket as T\nfrom typing import Any\nX = 1\n_y = 2\ndef f(): ..."
    assert offered(ast.parse(source)) == {"T", "X", "f"}


def test_imports_are_light():
    """`nengram`, its words and `--help` need no torch; no room loads a compiler, a plotter or transformers before it is used."""
    light = "nengram, nengram.config, nengram.cli, nengram.address, nengram.text"
    rooms = ", ".join(f"nengram.{room}" for room in ROOMS if room != "hf")
    script = (
        f"import sys, {light}\nfirst = set(sys.modules)\nimport {rooms}\n"
        f"print(*sorted(first & {HEAVY | {'torch'}}), *sorted(set(sys.modules) & {HEAVY}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_no_test_asserts_nothing():
    def rule(path: Path) -> list[str]:
        functions = {node.name: node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)}
        return [name for name in functions if name.startswith("test") and not asserts(functions[name], functions)]

    assert broken(rule, [path for path in EVERYWHERE if path.name.startswith("test_")]) == {}


def asserts(function: ast.FunctionDef, functions: dict[str, ast.FunctionDef], depth: int = 3) -> bool:
    """Whether a test asserts, expects an exception or warning, checks a process, or calls a function of its file that does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            checks = any(keyword.arg == "check" and ast.unparse(keyword.value) == "True" for keyword in node.keywords)
            if checks or name in ("raises", "warns", "fail") or name.startswith("assert"):
                return True
            if depth and name in functions and asserts(functions[name], functions, depth - 1):
                return True
    return False


def test_idle_tests_are_seen():
    tree = ast.parse("def test_a():\n    print(1)\ndef check():\n    assert x\ndef test_b():\n    check()")
    functions = {node.name: node for node in tree.body}
    assert not asserts(functions["test_a"], functions) and asserts(functions["test_b"], functions)
