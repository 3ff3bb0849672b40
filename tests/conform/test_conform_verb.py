"""`nengram conform`: what it prints, writes and exits with; and the document's foreign implementation, which really runs."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.conftest import run_command as run

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")


def test_without_anything_it_asks_our_own_fast_path(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "conform", "--out", tmp_path / "result.json")
    assert code == 0
    line = out.strip().splitlines()[-1]
    assert re.fullmatch(
        r"nengram conformance v1: engram 74/74 \+ 3 not offered, deepseek_v41 62/62, qwen_ple 79/79 \(nengram \S+\)",
        line,
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["line"] == line and result["command"] == "nengram conform --against nengram"
    assert result["dialects"]["qwen_ple"]["passed"] == 79 and result["dialects"]["qwen_ple"]["first_difference"] is None


def foreign(tmp_path, change=("", "")) -> str:
    """The document's implementation as a command, with one string of it replaced."""
    (source,) = re.findall(r"^```python\n(import json.*?)^```$", DOCUMENT, re.S | re.M)
    assert change[0] in source
    path = tmp_path / "mine.py"
    path.write_text(source.replace(*change) if change[0] else source)
    return shlex.join([sys.executable, str(path)])


def test_the_documents_foreign_implementation_passes(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "conform", "--command", foreign(tmp_path))
    assert code == 0, out
    assert (
        "(mine 1.0)" in out
        and "engram 40/40 + 37 not offered, deepseek_v41 28/28 + 34 not offered, qwen_ple 48/48" in out
    )


def test_a_bug_in_the_foreign_implementation_is_shown_and_fails(monkeypatch, capsys, tmp_path):
    wrong = foreign(tmp_path, ("mix ^= seen[lag] * multipliers[lag]", "mix ^= seen[lag] * multipliers[-1 - lag]"))
    code, out, _ = run(monkeypatch, capsys, "conform", "--dialect", "engram", "--command", wrong)
    assert code == 1
    assert re.search(
        r'engram: first difference: setting "small", "\w.*", layer 1, .*position \d+, slot \d+.*expected \d+, got', out
    )


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--command", "x", "--against", "transformers"), "give one"),
        (("--command", "'x"), "cannot be read as a command line"),
        (("--command", " "), "--command is empty"),
        (("--command", "./no-such-command"), "cannot start ./no-such-command"),
        (("--timeout", "0"), "must be above 0 s"),
        (("--against", "engram-peft", "--python", "./no-such-python"), "cannot start ./no-such-python"),
    ],
)
def test_a_users_mistake_is_one_line(monkeypatch, capsys, arguments, hint):
    code, _, error = run(monkeypatch, capsys, "conform", *arguments)
    assert code == 2 and hint in error and error.count("\n") == 1


def test_an_adapter_without_its_implementation_says_what_to_install(monkeypatch, capsys):
    pytest.importorskip("nengram")
    code, _, error = run(monkeypatch, capsys, "conform", "--against", "engram-peft", "--python", f"{sys.executable}")
    if code != 2:
        pytest.skip("engram-peft is installed here")
    assert "pip install engram-peft==1.2.7" in error and error.count("\n") == 1
