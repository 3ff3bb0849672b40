"""transformers' own qwen4_exp gives every row that the vectors of its dialect expect, decoding cache included."""

import sys

import pytest

from nengram import hf
from nengram.conform import check
from nengram.errors import ConfigError

pytest.importorskip("transformers", minversion="5.16", reason="transformers is not installed: pip install nengram[hf]")


@pytest.fixture(scope="module")
def reports():
    from nengram.hf import conform_qwen_reply

    return {report.dialect: report for report in check(conform_qwen_reply)}


def test_transformers_agrees_on_every_vector_of_its_dialect_that_it_can_express(reports):
    report = reports["qwen_ple"]
    assert report.clean, report.first("differs") or report.first("no answer")
    assert report.asked == 64


def test_only_starts_and_blocked_positions_are_not_offered(reports):
    left = [outcome.needs for outcome in reports["qwen_ple"].outcomes if outcome.status == "not offered"]
    assert len(left) == 15 and all({"starts", "blocked"} & set(needs) for needs in left)


def test_other_dialects_are_not_offered(reports):
    assert reports["engram"].asked == reports["deepseek_v41"].asked == 0


def test_without_transformers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "nengram.hf.conform_qwen", raising=False)
    with pytest.raises(ConfigError, match="pip install nengram"):
        hf.conform_qwen_reply  # noqa: B018
