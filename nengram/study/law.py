"""The law of allocation, read from a sweep: loss over rho at fixed parameters and FLOPs, what the controls keep, loss over rows.

Input are the rows of a sweep's rows.jsonl, finished or not, in any order. Runs are gathered by what was varied beside the share:

    setting    every key of `point` except share, arm, tokens, seed and learning rate; runs of different settings never meet
    curve      one setting at one number of training tokens, at three shares or more; rho = 1 is pure MoE, whatever the arm's name
    control    another arm at the share of an Engram run, of the same curve
    row line   Engram runs of points that set the number of table rows, and differ in it alone

Fits use the seeds that have every point of the curve; the others are named, and still drawn. All that is printed or drawn comes from
`law_summary`, which is JSON, and the same rows give the same summary, digit for digit.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np

from nengram.config import ARMS
from nengram.errors import NengramError
from nengram.study.claims import equal_cpu, interior_claim, kept_share, power, tokens_to_show
from nengram.study.fits import bootstrap_optimum, fit_log_rows, fit_monotone, fit_quadratic, half_width
from nengram.study.verdict import paired

MEASURES = ("test_nats", "dev_nats", "bits_per_byte")
COUNTED = ("point", "arm", "rho", "seed", "tokens")
NO_SETTING = ("budget.rho", "budget.arm", "train.tokens", "train.seed", "train.lr")
ROW_KEYS = ("memory.rows_per_head",)
PAPER = {  # section 3, the budget of 6e20 FLOPs: 9.9 B parameters, 993 M of them active
    "points": {"1.0": 1.7248, "0.8": 1.7109},  # validation loss; other points are in the paper's figure only
    "optimum": [0.75, 0.80],
    "about_equal_to_moe": 0.40,
    "total_over_active": 10,
    "tokens_per_parameter": 10,  # 6e20 / (6 x 993e6) tokens, our arithmetic
}


@dataclass(frozen=True)
class Runs:
    """The finished runs of one setting at one number of tokens, by (arm, rho, seed)."""

    setting: str  # canonical JSON
    tokens: int
    by_key: dict[tuple[str, float, int], dict]

    @property
    def label(self) -> str:
        """`1.23 M tokens`, and the setting where there is one."""
        varied = ", ".join(f"{key} {json.dumps(value)}" for key, value in json.loads(self.setting).items())
        return f"{self.tokens / 1e6:.3g} M tokens" + (f", {varied}" if varied else "")

    def of(self, arm: str, rho: float) -> dict[int, dict]:
        """Runs by seed."""
        return {seed: row for (a, r, seed), row in sorted(self.by_key.items()) if (a, r) == (arm, rho)}

    @property
    def moe(self) -> dict[int, dict]:
        """Pure MoE's runs by seed."""
        return self.of("moe", 1.0)

    @property
    def shares(self) -> list[float]:
        """Shares with an Engram or pure MoE run, rising."""
        return sorted({rho for arm, rho, _ in self.by_key if arm in ("engram", "moe")})

    def share(self, rho: float) -> dict[int, dict]:
        """The law's runs at a share, by seed."""
        return self.moe if rho == 1 else self.of("engram", rho)


def law_summary(rows: Iterable[dict], *, measure: str = "test_nats") -> dict[str, Any]:
    """Every number of the report, JSON-able.

    Raises: NengramError for a row without one of the fields that say which run it is.
    """
    rows = list(rows)
    groups = gather(rows, measure)
    curves = [curve for runs in groups if len(runs.shares) >= 3 and (curve := _curve(runs, measure))]
    return _plain(
        {
            "what": "allocation at fixed total parameters and forward FLOPs",
            "measure": measure,
            "runs": len(rows),
            "without_a_finite_loss": sum(not _finite(row.get(measure)) for row in rows),
            "curves": curves,
            "controls": [part for runs in groups for part in _controls(runs, measure)],
            "rows": _row_lines(rows, measure),
            "equal_cpu": _equal_cpu(groups, measure),
            "tokens_to_show": _trends(curves),
            "paper": PAPER,
        }
    )


def gather(rows: Sequence[dict], measure: str, *, aside: Sequence[str] = ()) -> list[Runs]:
    """Runs with a finite loss by setting and tokens, both rising; of two rows of one run the later counts. Raises NengramError.

    aside: more keys of `point` that make no setting.
    """
    found: dict[tuple[str, int], dict] = {}
    for number, row in enumerate(rows, 1):
        lacking = [name for name in COUNTED if name not in row]
        if lacking:
            raise NengramError(f"sweep row {number} has no {lacking[0]}")
        rho = 1.0 if row["arm"] == "moe" else round(float(row["rho"]), 6)
        arm = "moe" if row["arm"] == "engram" and rho == 1 else str(row["arm"])
        setting = {key: value for key, value in row["point"].items() if key not in (*NO_SETTING, *aside)}
        if _finite(row.get(measure)):
            group = found.setdefault((json.dumps(setting, sort_keys=True), int(row["tokens"])), {})
            group[arm, rho, int(row["seed"])] = row
    return [Runs(*key, by_key) for key, by_key in sorted(found.items())]


def _curve(runs: Runs, measure: str) -> dict[str, Any]:
    """One budget's points, fits and claim."""
    shares, at = runs.shares, {rho: runs.share(rho) for rho in runs.shares}
    everyone = sorted(set().union(*at.values()))
    seeds = [seed for seed in everyone if all(seed in runs_s for runs_s in at.values())]
    x_P, losses_SP = np.array(shares), np.array([[at[rho][s][measure] for rho in shares] for s in seeds])
    enough = len(seeds) > 1
    claim = interior_claim(x_P, losses_SP) if enough else None
    cost = next(iter((runs.moe or at[shares[0]]).values())).get("cost", {})
    return {
        "label": runs.label,
        "setting": json.loads(runs.setting),
        "tokens": runs.tokens,
        "seeds": seeds,
        "unfinished_seeds": [seed for seed in everyone if seed not in seeds],
        "total_over_active": cost["total"] / cost["active"] if cost.get("active") else None,
        "tokens_per_parameter": runs.tokens / cost["total"] if cost.get("total") else None,
        "half_width": half_width(losses_SP) if enough else None,
        "points": [_point(rho, at[rho], runs.moe, measure) for rho in shares],
        "quadratic": fit_quadratic(x_P, losses_SP) if seeds else None,
        "monotone": fit_monotone(x_P, losses_SP) if seeds else None,
        "optimum": bootstrap_optimum(x_P, losses_SP) if enough else None,
        "claim": claim and asdict(claim) | {"claimed": claim.claimed, "words": claim.words},
        "power": claim
        and {"low_end": power(claim.against_low.differences), "high_end": power(claim.against_high.differences)},
    }


def _point(rho: float, at: dict[int, dict], moe: dict[int, dict], measure: str) -> dict[str, Any]:
    both = [seed for seed in at if seed in moe]
    first = next(iter(at.values()))
    return {
        "rho": rho,
        "rows": first.get("rows", 0),
        "mean": float(np.mean([row[measure] for row in at.values()])),
        "losses": {str(seed): row[measure] for seed, row in at.items()},
        "total": first.get("cost", {}).get("total"),
        "flops": first.get("cost", {}).get("flops"),
        "lr": first.get("lr"),
        "cpu_ms_per_token": float(np.mean([row.get("cpu_ms_per_token") or math.nan for row in at.values()])),
        "against_moe": _paired(at, moe, both, measure) if both and rho < 1 else None,
    }


def _controls(runs: Runs, measure: str) -> list[dict[str, Any]]:
    """What each control keeps of the gain at its share."""
    found = []
    others = {(arm, rho) for arm, rho, _ in runs.by_key if arm not in ("engram", "moe")}
    for arm, rho in sorted(
        others, key=lambda one: (one[1], ARMS.index(one[0]) if one[0] in ARMS else len(ARMS), one[0])
    ):
        control, engram, moe = runs.of(arm, rho), runs.share(rho), runs.moe
        seeds = [seed for seed in control if seed in engram and seed in moe]
        if rho == 1 or not seeds:
            continue
        losses = [[at[seed][measure] for seed in seeds] for at in (moe, engram, control)]
        first = control[seeds[0]]
        found.append(
            {
                "label": runs.label,
                "arm": arm,
                "rho": rho,
                "seeds": seeds,
                "mean": float(np.mean(losses[2])),
                "total": first.get("cost", {}).get("total"),
                "flops": first.get("cost", {}).get("flops"),
                "against_moe": _paired(control, moe, seeds, measure),
                "against_engram": _paired(control, engram, seeds, measure),
                "keeps": kept_share(*losses),
            }
        )
    return found


def _row_lines(rows: Sequence[dict], measure: str) -> list[dict[str, Any]]:
    """Loss over log2(rows) wherever Engram runs set their rows and differ in nothing else, at three sizes or more."""
    lines: dict[tuple[str, int, float], dict[int, dict[int, dict]]] = {}
    for row in rows:
        if not any(key in row["point"] for key in ROW_KEYS):
            continue
        for runs in gather([row], measure, aside=ROW_KEYS):
            for (arm, rho, seed), run in runs.by_key.items():
                if arm == "engram" and run.get("rows"):
                    sizes = lines.setdefault((runs.setting, runs.tokens, rho), {})
                    sizes.setdefault(int(run["rows"]), {})[seed] = run
    found = []
    for (setting, tokens, rho), sizes in sorted(lines.items()):
        seeds = sorted(set.intersection(*(set(at) for at in sizes.values())))
        if len(sizes) < 3 or not seeds:
            continue
        counts = sorted(sizes)
        losses_SP = np.array([[sizes[count][seed][measure] for count in counts] for seed in seeds])
        found.append(
            {
                "label": f"{Runs(setting, tokens, {}).label}, rho {rho:.0%}",
                "tokens": tokens,
                "rho": rho,
                "seeds": seeds,
                "rows": counts,
                "losses": losses_SP,
                "half_width": half_width(losses_SP) if len(seeds) > 1 else None,
                "fit": fit_log_rows(np.array(counts), losses_SP),
            }
        )
    return found


def _equal_cpu(groups: list[Runs], measure: str) -> list[dict[str, Any]]:
    """Engram at each share against pure MoE at the same CPU seconds, where both ran at two budgets or more, on one kind of CPU."""
    found = []
    for setting in sorted({runs.setting for runs in groups}):
        budgets = [runs for runs in groups if runs.setting == setting and runs.moe]
        for rho in sorted({rho for runs in budgets for rho in runs.shares if rho < 1}):
            here = [runs for runs in budgets if runs.share(rho)]
            every = [*(runs.share(rho) for runs in here), *(runs.moe for runs in budgets)]
            seeds = sorted(set.intersection(*map(set, every))) if len(budgets) > 1 else []
            if not seeds or any(not _finite(at[seed].get("cpu_seconds")) for at in every for seed in seeds):
                continue
            if len({at[seed].get("environment", {}).get("cpu") for at in every for seed in seeds}) > 1:
                continue  # seconds of two machines are not seconds of one
            numbers = [
                np.array([[at[seed][name] for seed in seeds] for at in part])
                for part in ([runs.share(rho) for runs in here], [runs.moe for runs in budgets])
                for name in ("cpu_seconds", measure)
            ]
            for runs, reading in zip(here, equal_cpu(*numbers), strict=True):
                same_tokens = _paired(runs.share(rho), runs.moe, seeds, measure)
                found.append(
                    {"label": runs.label, "rho": rho, "seeds": seeds, "equal_tokens": same_tokens, **asdict(reading)}
                )
    return found


def _trends(curves: list[dict]) -> list[dict[str, Any]]:
    """Where no interior optimum is claimed at the largest budget: the tokens at which one would show, if the trend goes on."""
    found = []
    for setting in sorted({json.dumps(curve["setting"], sort_keys=True) for curve in curves}):
        budgets = [c for c in curves if json.dumps(c["setting"], sort_keys=True) == setting and c["claim"]]
        if len(budgets) < 2 or budgets[-1]["claim"]["claimed"] or len({len(c["seeds"]) for c in budgets}) > 1:
            continue
        tokens = [curve["tokens"] for curve in budgets]
        ends = {
            end: tokens_to_show(tokens, np.array([curve["claim"][against]["differences"] for curve in budgets]))
            for end, against in (("low_end", "against_low"), ("high_end", "against_high"))
        }
        found.append({"setting": json.loads(setting), **ends})
    return found


def _paired(first: dict[int, dict], second: dict[int, dict], seeds: Sequence[int], measure: str) -> dict[str, Any]:
    return paired([first[seed][measure] - second[seed][measure] for seed in seeds]).to_dict()


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """Dataclasses, arrays and NaN as JSON has them."""
    if is_dataclass(value) and not isinstance(value, type):
        refused = {"refused": value.refused} if "shape_degrees" in value.__dataclass_fields__ else {}
        return _plain({name: getattr(value, name) for name in value.__dataclass_fields__} | refused)
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(one) for one in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
