"""lm-eval on whatever `loading.opened` opens: our runs, grafted models, released models, tables on any tier.

lm-eval finds models by a registry that a module fills when it is imported, and looks for no plug-ins; so this file is both: the
registered class, and the launcher that imports it.

    nengram eval runs/demo-engram --tasks nengram_facts,nengram_text
    lm_eval.simple_evaluate("nengram", {"pretrained": "runs/demo-engram", "table_tier": "mapped"}, tasks)   # after importing this
"""

import json
import logging
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from nengram.config import TableOptions
from nengram.errors import CheckpointError, ConfigError, DataError, nearest
from nengram.files import write_atomic
from nengram.hf.loading import first_line, opened

try:
    import lm_eval
    import transformers
    from lm_eval import evaluator
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from nengram.hf.tasks import local_tasks
except ModuleNotFoundError as missing:
    raise ConfigError(f"{missing.name} is missing: pip install nengram[eval]") from None

RESULTS = "results.json"
FACTS = "nengram_facts_{}_{}"
BOOTSTRAPS = 100  # of metrics that are no mean


@register_model("nengram")
class NengramLM(HFLM):
    """lm-eval's own class around a model that `opened` opens. `close` gives its files back.

    pretrained: run or folder; adapters: folders, as a list or joined by commas; table_tier, device, dtype: as `opened`.
    """

    def __init__(
        self,
        pretrained: str,
        adapters: str | Sequence[str] = (),
        table_tier: str = "resident",
        tables: TableOptions | None = None,
        device: str | None = "auto",
        dtype: str = "auto",
        batch_size: int = 8,
        console: Console | None = None,
        **options: Any,
    ) -> None:
        self._closing = ExitStack()
        names = [name for name in adapters.split(",") if name] if isinstance(adapters, str) else list(adapters)
        how = {"tables": tables or TableOptions(table_tier=table_tier), "device": device or "auto", "dtype": dtype}
        one = self._closing.enter_context(opened(pretrained, adapters=names, console=console, **how))
        try:
            _check_tokenizer(one.tokenizer, pretrained)
            super().__init__(pretrained=one.model, tokenizer=one.tokenizer, batch_size=batch_size, **options)
        except BaseException:
            self.close()
            raise

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each behind one separator: lm-eval puts it there, so the tokenizer must not.

        (lm-eval's own class lets it: it reads two, and counts the second as a token of the text.)
        """
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.add_bos_token = before

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """With one bar a task, not one for each batch of whole texts, and none where nobody watches."""
        hidden = disable_tqdm or override_bs is not None or not sys.stderr.isatty()
        return super()._loglikelihood_tokens(requests, disable_tqdm=hidden, override_bs=override_bs)

    def close(self) -> None:
        """Close the tables. Closing twice is harmless."""
        self._closing.close()


def _check_tokenizer(tokenizer: Any, where: str) -> None:
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{where}: its tokenizer has neither a bos nor an eos token, one of which lm-eval puts before every text: "
            "set one and save the tokenizer again"
        )


class Tasks(TaskManager):
    """lm-eval's tasks and ours, in which a name that does not exist, or has no data here, is one line.

    names: what will be asked for; the index of lm-eval's 14,000 files is read only if one of them is not ours.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._local = names, local_tasks()
        super().__init__(include_defaults=not set(names) <= self._local.keys())

    def chosen(self) -> list[Any]:
        """The tasks, their data loaded. Raises: ConfigError for an unknown name, DataError for data out of reach."""
        known = [*self._local, *self.all_tasks]
        for name in self._names:
            if name not in known:
                ours = ", ".join(self._local)
                raise ConfigError(f'there is no task "{name}"{nearest(name, known)}; of our own there are {ours}')
        found: dict[str, Any] = {}
        for name in self._names:
            found |= self._loaded(name)
        return list(found.values())

    def _loaded(self, name: str) -> dict[str, Any]:
        try:
            loaded = self.load(list(self._local.get(name, [name])))
            inside = {child for children in loaded["group_map"].values() for child in children}
            every = {**loaded["groups"], **loaded["tasks"]}
            return {name: found for name, found in every.items() if name not in inside}
        except (OSError, ValueError, ImportError, KeyError) as error:  # what datasets raises is one of these
            if name in self._local:
                raise
            raise DataError(f'task "{name}": its data cannot be had here: {first_line(error)}') from error


def evaluate(
    where: str | Path,
    tasks: Sequence[str],
    *,
    adapters: Sequence[str | Path] = (),
    tables: TableOptions | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Scores of a model on lm-eval tasks, and what they were made with; plain JSON.

    where, adapters, tables, device, dtype: as `opened`. tasks: names of ours (`nengram_facts`, `nengram_text`) or lm-eval's.
    limit: questions per task. shots: solved examples before each question, where the task has some.
    Raises: as `opened` and `Tasks.chosen`; CheckpointError for a folder that is not there, before anything is read.
    """
    if not tasks:
        raise ConfigError(f"no task is named; of our own there are {', '.join(local_tasks())}")
    if not Path(where).exists():
        raise CheckpointError(f"{where}: no such folder")
    began = time.monotonic()
    how = {"tables": tables, "device": device, "dtype": dtype, "console": console}
    with _quiet():
        manager = Tasks(tasks)
        chosen = manager.chosen()
        model = NengramLM(str(where), adapters=[str(folder) for folder in adapters], batch_size=batch_size, **how)
        try:
            asked = {"limit": limit, "num_fewshot": shots, "bootstrap_iters": BOOTSTRAPS, "task_manager": manager}
            with mock.patch.object(evaluator, "get_git_commit_hash", lambda: None):  # git would print "fatal" here
                found = evaluator.simple_evaluate(model, tasks=chosen, log_samples=False, **asked)
        finally:
            model.close()
    scores = {name: _scores(values) for name, values in found["results"].items()}
    return {
        "model": str(where),
        "adapters": [str(folder) for folder in adapters],
        "table_tier": (tables or TableOptions()).table_tier,
        "tasks": {
            name: {"questions": found["n-samples"].get(name, {}).get("effective"), "scores": scores[name]}
            for name in sorted(scores)
            if scores[name]
        },
        "recall": _recall(scores),
        "limit": limit,
        "shots": shots,
        "seconds": round(time.monotonic() - began, 1),
        "made_with": {
            "lm_eval": lm_eval.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": str(model.device),
            "date": time.strftime("%Y-%m-%d"),
        },
    }


def run_tasks(
    where: Path, tasks: Sequence[str], *, out: Path | None, as_json: bool, console: Console, **how: Any
) -> dict[str, Any]:
    """`evaluate` with what it prints, and results.json in `out`. Raises: as `evaluate`; OSError."""
    results = evaluate(where, tasks, console=console, **how)
    text = json.dumps(results, indent=1)
    if out is not None:
        write_atomic(out / RESULTS, text + "\n")
    if as_json:
        print(text)
        return results
    console.print(_table(where, results))
    for kind, (gain, error) in results["recall"].items():
        told = f"{kind}: shown facts {gain:+.3f} above never-shown ones, {1.96 * error:.3f} either way (95 %)"
        console.print(told, highlight=False)
    if out is not None:
        console.print(str(out / RESULTS), highlight=False, soft_wrap=True)
    return results


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, lm-eval tells errors only: it warns of whatever was left to its defaults."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _scores(values: dict[str, Any]) -> dict[str, float]:
    """The metric "acc,none" as "acc", one behind a filter as "exact_match (years)", a standard error as "acc ±"."""
    named = {}
    for key, value in values.items():
        if "," not in key or isinstance(value, str):
            continue
        metric, _, behind = key.partition(",")
        metric = f"{metric.removesuffix('_stderr')} ±" if metric.endswith("_stderr") else metric
        named[metric if behind == "none" else f"{metric} ({behind})"] = float(value)
    return {name: value for name, value in named.items() if math.isfinite(value)}


def _recall(scores: dict[str, dict[str, float]]) -> dict[str, tuple[float, float]]:
    """What shown facts have above never-shown ones, with the standard error of the difference, by kind of question."""
    found = {}
    for kind, metric in (("choice", "acc"), ("dates", "exact_match (years)")):
        parts = [scores.get(FACTS.format(kind, part), {}) for part in ("shown", "never")]
        if all(metric in part for part in parts):
            errors = [part.get(_error_of(metric), 0.0) for part in parts]
            found[kind] = parts[0][metric] - parts[1][metric], math.hypot(*errors)
    return found


def _error_of(metric: str) -> str:
    name, space, behind = metric.partition(" (")
    return f"{name} ±{space}{behind}"


def _table(where: Path, results: dict[str, Any]) -> Table:
    table = Table(title=f"{where}, tables {results['table_tier']}")
    for name in ("task", "questions", "metric", "value", "±"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, found in results["tasks"].items():
        head = task, f"{found['questions']:,}" if found["questions"] else ""
        for metric, value in found["scores"].items():
            if "±" not in metric:
                error = found["scores"].get(_error_of(metric))
                table.add_row(*head, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
                head = ("", "")
    return table
