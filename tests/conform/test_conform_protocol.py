"""The runner outlives whatever it asks: crash, hang, garbage, flood, wrong shapes; each is one sentence, and none is a pass."""

import json
import os
import sys
import time

import numpy as np
import pytest

from nengram.conform import Command, Function, NoAnswer, check, conform, load
from nengram.conform.own import Own
from nengram.errors import ConfigError

QUESTION = {"ask": "about"}


def command(source, timeout_s=5.0):
    return Command([sys.executable, "-c", source], timeout_s=timeout_s)


def lost(implementation, question=QUESTION) -> str:
    """The sentence instead of an answer."""
    try:
        with pytest.raises(NoAnswer) as caught:
            implementation.ask(question)
    finally:
        implementation.close()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import sys; sys.exit(7)", "ended with exit code 7"),
        ("raise ValueError('no table')", "exit code 1: ValueError: no table"),
        ("import os; os.kill(os.getpid(), 11)", "ended with signal 11"),
        ("input(); print('half', end='')", "in the middle of an answer ('half')"),
        ("input(); print('Loading weights...')", "not JSON: 'Loading weights...'"),
        ("input(); print('{\"rows\": NaN}')", "NaN is no number of JSON"),
        ("input(); print('[' * 100000)", "not JSON"),
        ("import sys; input(); sys.stdout.buffer.write(b'\\xff\\xfe\\n')", "not JSON"),
        ("input(); print('9' * 10000)", "not JSON"),
    ],
)
def test_a_command_that_breaks_is_one_sentence(source, sentence):
    assert sentence in lost(command(source))


def test_a_silent_command_is_killed_with_all_its_children(tmp_path):
    source = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    assert "no answer within 1.5 s, killed" in lost(command(source, timeout_s=1.5))
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
    except OSError:
        return os.path.exists(f"/proc/{pid}")


def test_a_flood_is_cut_off(monkeypatch):
    monkeypatch.setattr("nengram.conform.protocol.LONGEST_ANSWER", 2**20)
    assert "longer than 1,048,576 bytes, killed" in lost(
        command("while True: print('x' * 10000, end='')", timeout_s=30.0)
    )


def test_two_lines_for_one_question_are_noticed():
    asked = command("for line in iter(input, ''): print('{}\\n{}', flush=True)")
    assert asked.ask(QUESTION) == {}
    assert "more than one line for one question" in lost(asked)


def test_a_command_that_does_not_exist_is_the_users_mistake():
    with pytest.raises(ConfigError, match="cannot start ./no-such-command"):
        Command(["./no-such-command"]).ask(QUESTION)


def test_a_command_starts_again_after_it_broke(tmp_path):
    count = tmp_path / "starts"
    source = f"""
import sys
with open({str(count)!r}, "a") as file: file.write("x")
starts = len(open({str(count)!r}).read())
for line in sys.stdin:
    if starts == 1: sys.exit(1)
    print('{{"name": "second"}}', flush=True)
"""
    asked = command(source)
    with pytest.raises(NoAnswer):
        asked.ask(QUESTION)
    assert asked.ask(QUESTION) == {"name": "second"}
    asked.close()


def test_a_callable_that_raises_exits_or_hangs_is_one_sentence():
    def leave(question):
        sys.exit("bye")

    assert "raised SystemExit: bye" in lost(Function(leave))
    assert "raised ZeroDivisionError" in lost(Function(lambda question: 1 / 0))
    assert "no answer within 0.1 s" in lost(Function(lambda question: time.sleep(60), timeout_s=0.1))


def test_a_callable_cannot_change_the_questions_that_come_after():
    def vandal(question):
        answer = Own()(json.loads(json.dumps(question)))
        question.clear()
        return answer

    assert all(report.clean for report in check(vandal, ["deepseek_v41"]))


RIGHT = Own()


def spoiled(change):
    """Our own answers about rows, changed."""

    def reply(question):
        answer = RIGHT(question)
        if question["ask"] != "rows":
            return answer
        plain = [{str(id_): rows.tolist() for id_, rows in call.items()} for call in answer["rows"]]
        return change(plain)

    return reply


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: None, "an answer is a JSON object, got None"),
        (lambda rows: {"row": rows}, "has no \"rows\", only ['row']"),
        (lambda rows: {"rows": rows + rows}, "1 calls expected, got 2"),
        (lambda rows: {"rows": [{"1": call["1"]} for call in rows]}, "rows by layer 1, 3 expected, got ['1']"),
        (lambda rows: {"rows": [{key: one[0] for key, one in call.items()} for call in rows]}, "slots expected"),
        (
            lambda rows: {"rows": [{key: one * 2 for key, one in call.items()} for call in rows]},
            "1 sequences expected, got 2",
        ),
        (
            lambda rows: {"rows": [{k: [[s[:-1] for s in b] for b in one] for k, one in c.items()} for c in rows]},
            "call 0, layer 1, sequence 0, position 0: 4 slots expected, got 3",
        ),
        (
            lambda rows: {
                "rows": [{k: [[[*s[:-1], 0.5] for s in b] for b in one] for k, one in c.items()} for c in rows]
            },
            "slot 3: an integer expected, got 0.5",
        ),
        (
            lambda rows: {
                "rows": [{k: [[[*s[:-1], True] for s in b] for b in one] for k, one in c.items()} for c in rows]
            },
            "slot 3: an integer expected, got True",
        ),
    ],
)
def test_a_wrong_shape_is_named_by_its_place_and_is_no_pass(change, sentence):
    (report,) = check(spoiled(change), ["engram"])
    rows = [outcome for outcome in report.outcomes if outcome.setting == "small" and outcome.case != "numbers"]
    assert {outcome.status for outcome in rows} == {"no answer"}
    assert sentence in rows[0].said or "positions expected" in rows[0].said
    assert not report.clean


def test_rows_as_arrays_and_layer_ids_as_integers_are_understood():
    numbers = {"rows": [{1: np.zeros((1, 2, 3), np.int64)}]}
    assert Function(lambda question: numbers).ask(QUESTION) == {"rows": [{"1": [[[0, 0, 0], [0, 0, 0]]]}]}


def test_what_is_not_offered_is_counted_apart_and_offering_nothing_is_no_pass():
    (report,) = check(lambda question: {"not_offered": "not yet"}, ["qwen_ple"])
    assert report.count("not offered") == len(load("qwen_ple")) and report.asked == report.passed == 0
    assert not report.clean and report.guess is None


def test_after_a_few_losses_the_rest_is_not_asked():
    asked = []

    def dead(question):
        asked.append(question)
        raise RuntimeError("out of memory")

    report = conform(Function(dead), load("engram"))
    assert len(asked) == report.count("no answer") == 3
    assert report.count("not asked") == len(load("engram")) - 3 and not report.clean
