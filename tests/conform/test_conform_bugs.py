"""Every known bug, put into a copy of our own hash on purpose, is caught and called by its name."""

import pytest

from nengram.conform import BUGS, DIALECTS, check, load
from nengram.conform.bugs import SINGLE, Hypothesis, Steps, numbers, rows
from nengram.conform.classes import CLASS_BUGS, classes_of
from nengram.text.compress_reference import number_by_first_appearance, token_key

CANNOT_SHOW = {  # what a dialect's own rules make invisible
    "engram": {"end of text ignored", "end of text does not see its own text"},
    "deepseek_v41": {
        "end of text ignored",
        "end of text does not see its own text",
        "signed modulo",  # no product is negative without negative ids, which only the demo hashes
        "primes handed out by ascending layer id",  # its layers are listed in ascending order
    },
    "qwen_ple": {"pad not compressed", "signed modulo", "primes handed out by ascending layer id"},  # ids are raw
}
ASKED_FOR = {
    "window off by one",
    "reversed multipliers",
    "pad not compressed",
    "primes restarted per layer",
    "rounded multipliers",
    "signed modulo",
    "mixed-in head index",
}


def copy_of_our_hash(dialect, steps=None, classes=classes_of):
    """An implementation by steps, of which some may be wrong."""
    settings = {setting.name: setting for setting in load(dialect).settings}
    steps = steps or Steps()

    def reply(question):
        if question["ask"] == "classes":
            return {"classes": classes(question["tokens"])}
        if question["ask"] == "about":
            return {"name": "a copy"}
        setting = settings[question["setting"]["name"]]
        if question["ask"] == "rows":
            return {"rows": rows(setting, question["calls"], steps)}
        layers = zip(numbers(setting, steps), setting.spec.layers, strict=True)
        return {"layers": [layer | {"num_rows": right.num_rows} for layer, right in layers]}

    return reply


def report_of(dialect, steps=None, classes=classes_of):
    (report,) = check(copy_of_our_hash(dialect, steps, classes), [dialect])
    return report


def visible(dialect):
    return [
        pytest.param(dialect, hypothesis, id=f"{dialect}-{hypothesis.bugs[0]}-{at}")
        for at, hypothesis in enumerate(SINGLE)
        if hypothesis.bugs[0] not in CANNOT_SHOW[dialect]
    ]


def assert_named(report, hypothesis: Hypothesis):
    assert not report.clean and report.first("differs").difference is not None
    assert report.guess.bug == " + ".join(hypothesis.bugs), report.guess
    assert report.guess.explained == report.guess.wrong == report.count("differs")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_unbroken_copy_passes_everything(dialect):
    report = report_of(dialect)
    assert report.clean and report.guess is None and report.passed == len(load(dialect))


@pytest.mark.parametrize(("dialect", "hypothesis"), [case for dialect in DIALECTS for case in visible(dialect)])
def test_every_known_bug_is_caught_and_rightly_named(dialect, hypothesis):
    assert_named(report_of(dialect, hypothesis.steps), hypothesis)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_a_dialect_cannot_show_changes_no_answer(dialect):
    hidden = [hypothesis for hypothesis in SINGLE if hypothesis.bugs[0] in CANNOT_SHOW[dialect]]
    assert hidden and all(report_of(dialect, hypothesis.steps).clean for hypothesis in hidden)


def test_every_bug_is_visible_in_some_dialect():
    assert set(BUGS) >= ASKED_FOR
    assert not set.intersection(*CANNOT_SHOW.values())
    assert set.union(*CANNOT_SHOW.values()) <= set(BUGS)


@pytest.mark.parametrize("bug", CLASS_BUGS)
def test_a_wrong_compression_is_caught_and_named(bug):
    report = report_of("engram", classes=CLASS_BUGS[bug])
    assert report.guess.bug == bug and report.guess.explained == report.guess.wrong == report.count("differs")
    assert report.first("differs").difference.place["token"] > 0


def test_dropping_only_accents_is_called_combining_marks():
    def only_accents(tokens):
        return number_by_first_appearance([token_key(token, token, ("Mn",)) for token in tokens])

    report = report_of("deepseek_v41", classes=only_accents)
    assert report.guess.bug == "combining marks: only Mn dropped"
    assert report.guess.explained == report.guess.wrong == report.count("differs") > 0


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "bugs",
    [
        ("short n-grams at the left end of the longest window", "reversed multipliers"),
        ("pad is zero", "offsets of the slots missing"),
        ("primes restarted per layer", "mixed-in head index"),
    ],
)
def test_two_bugs_at_once_are_both_named(dialect, bugs):
    first, second = (next(one for one in SINGLE if one.bugs[0] == bug) for bug in bugs)
    both = first.joined(second)
    assert_named(report_of(dialect, both.steps), both)


def test_three_bugs_at_once_are_named_where_the_third_shows_elsewhere():
    bugs = (
        "short n-grams at the left end of the longest window",
        "reversed multipliers",
        "primes handed out by ascending layer id",
    )
    three = [next(one for one in SINGLE if one.bugs[0] == bug) for bug in bugs]
    assert_named(
        report_of("engram", three[0].joined(three[1]).joined(three[2]).steps),
        three[0].joined(three[1]).joined(three[2]),
    )


def test_an_unknown_bug_is_not_given_a_name():
    report = report_of("engram", Steps(remainder=lambda mix, modulus: (mix // 3) % modulus))
    assert report.count("differs") > 20 and report.guess is None


def test_the_first_difference_is_the_earliest_position_of_the_first_wrong_question():
    reply = copy_of_our_hash("engram")

    def wrong_late(question):
        answer = reply(question)
        if question["ask"] == "rows" and len(question["calls"][0]["ids"][0]) == 40:
            answer["rows"][0]["3"][0][17][2] += 1
            answer["rows"][0]["1"][0][20][0] += 1
        return answer

    (report,) = check(wrong_late, ["engram"])
    (differing,) = (outcome for outcome in report.outcomes if outcome.status == "differs")
    assert differing.case == "40 tokens"
    place = {"layer": 3, "sequence": 0, "position": 17, "slot": 2, "order": 3, "head": 0}
    assert differing.difference.place == place
    assert differing.difference.got == differing.difference.expected + 1
