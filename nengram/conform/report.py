"""What a run found, three ways: a file that a document's table is made from, a table for the terminal, one line for a README."""

import datetime
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nengram.conform.runner import Difference, Outcome, Report
from nengram.conform.vectors import FORMAT

KINDS = ("rows", "numbers", "classes")


def passes(reports: Sequence[Report]) -> bool:
    """Whether at least one dialect was asked, and every one that was is clean."""
    asked = [report for report in reports if report.asked]
    return bool(asked) and all(report.clean for report in asked)


def one_line(reports: Sequence[Report], implementation: dict[str, str]) -> str:
    """The result, fit for another project's README."""
    parts = []
    for report in reports:
        if report.asked:
            rest = report.count("not offered")
            parts.append(
                f"{report.dialect} {report.passed}/{report.asked}" + (f" + {rest} not offered" if rest else "")
            )
    return f"nengram conformance v{FORMAT}: {', '.join(parts) or 'nothing offered'} ({named(implementation)})"


def named(implementation: dict[str, str]) -> str:
    """Name and version of what was asked."""
    return f"{implementation.get('name', 'unnamed')} {implementation.get('version', '')}".strip()


def to_dict(reports: Sequence[Report], implementation: dict[str, str], command: str) -> dict[str, Any]:
    """The run as a file keeps it."""
    return {
        "format": FORMAT,
        "command": command,
        "implementation": implementation,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "line": one_line(reports, implementation),
        "dialects": {report.dialect: _dialect(report) for report in reports},
    }


def _dialect(report: Report) -> dict[str, Any]:
    kept = ("differs", "no answer", "not offered", "not asked")
    first, lost = report.first("differs"), report.first("no answer")
    return {
        "questions": len(report.outcomes),
        "asked": report.asked,
        "passed": report.passed,
        **{status.replace(" ", "_"): report.count(status) for status in kept},
        "by_kind": {kind: by_kind(report, kind) for kind in KINDS},
        "row_numbers_right": sum(one.right for one in report.outcomes),
        "row_numbers_compared": sum(one.compared for one in report.outcomes),
        "first_difference": asdict(first) if first else None,
        "first_without_answer": asdict(lost) if lost else None,
        "guess": str(report.guess) if report.guess else "",
        "why_not_offered": sorted({one.said for one in report.outcomes if one.status == "not offered"}),
        "differing": [f"{one.setting}: {one.case}" for one in report.outcomes if one.status == "differs"],
    }


def by_kind(report: Report, kind: str) -> str:
    """`5 of 40`: questions of one kind that were answered rightly, of those that had to be; `-` if there were none."""
    asked = sum(outcome.kind == kind and outcome.status != "not offered" for outcome in report.outcomes)
    return f"{report.count('passed', kind)} of {asked}" if asked else "-"


def where(outcome: Outcome) -> str:
    """The place of a difference in words."""
    return f'setting "{outcome.setting}", "{outcome.case}"{_place(outcome.difference)}'


def _place(difference: Difference | None) -> str:
    return "".join(f", {name} {value!r}" for name, value in difference.place.items()) if difference else ""


def print_reports(reports: Sequence[Report], implementation: dict[str, str], console: Console) -> None:
    """Counts, the first difference and the guess of each dialect, then the one line."""
    table = Table(title=f"Conformance v{FORMAT} of {escape(named(implementation))}")
    table.add_column("dialect")
    for header in ("questions", "passed", "differ", "no answer", "not offered", "not asked", *KINDS):
        table.add_column(header, justify="right")
    for report in reports:
        statuses = ("passed", "differs", "no answer", "not offered", "not asked")
        counts = (len(report.outcomes), *map(report.count, statuses), *(by_kind(report, kind) for kind in KINDS))
        table.add_row(report.dialect, *map(str, counts))
    console.print(table)
    for report in reports:
        for line in findings(report):
            console.print(f"{report.dialect}: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(one_line(reports, implementation), markup=False, highlight=False, soft_wrap=True)


def findings(report: Report) -> list[str]:
    """What is wrong with one dialect, a line each: the first difference, the guess, the first lost answer, what is not offered."""
    lines = []
    if differing := report.first("differs"):
        found = differing.difference
        lines.append(f"first difference: {where(differing)}: expected {found.expected}, got {found.got}")
        lines.append(f"looks like: {report.guess or 'no known bug'}")
    if lost := report.first("no answer"):
        lines.append(f'no answer: setting "{lost.setting}", "{lost.case}": {lost.said}')
    reasons: dict[str, int] = {}
    for outcome in report.outcomes:
        if outcome.status == "not offered":
            reasons[outcome.said] = reasons.get(outcome.said, 0) + 1
    lines += [f"not offered, {count} times: {reason}" for reason, count in reasons.items()]
    return lines
