"""Runs side by side: one process a job, as many at a time as there are cores, watched through their metrics files.

A job that is interrupted is continued by its next start, so the whole set is resumable for nothing. Children get their own session:
Ctrl-C reaches the parent alone, which stops them and says how to go on.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from nengram.errors import NengramError

THREADS = 1  # of each job


@dataclass(frozen=True)
class Job:
    """A process to run. `folder` is where its metrics.jsonl and log.txt go; `done` is the file that proves it finished."""

    name: str
    argv: tuple[str, ...]
    folder: Path
    done: Path
    steps: int


def run_jobs(
    jobs: Sequence[Job],
    console: Console,
    at_once: int | None = None,
    *,
    finished: Callable[[Job], None] | None = None,
    failed: Callable[[Job, str], None] | None = None,
) -> None:
    """Run every job that is not done, showing step, loss, rate and time left.

    Args:
        finished: called with each job as it ends well; not with those that were done before.
        failed: called with each job that fails and the last line of its log, instead of raising; the others go on.
    Raises: NengramError with the last line of the log of the first job that fails; KeyboardInterrupt after stopping all.
    """
    waiting = [job for job in jobs if not job.done.exists()]
    running: dict[Job, subprocess.Popen] = {}
    at_once = at_once or cores()
    began, last_line = time.monotonic(), 0.0
    at_start = _steps_done(jobs)
    live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
    try:
        if live:
            live.start()
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[job] = _start(job)
            time.sleep(0.5)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    if not process.returncode:
                        if finished:
                            finished(job)
                    elif failed:
                        failed(job, _last_line(job.folder / "log.txt"))
                    else:
                        raise NengramError(f"{job.name} failed: {_last_line(job.folder / 'log.txt')}")
            if live:
                live.update(_table(jobs, running, began, at_start))
            elif time.monotonic() - last_line > 20:
                last_line = time.monotonic()
                console.print(_line(jobs, running, began, at_start), highlight=False)
    finally:
        if live:
            live.stop()
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(job: Job) -> subprocess.Popen:
    job.folder.mkdir(parents=True, exist_ok=True)
    threads = {
        name: str(THREADS)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    }
    with open(job.folder / "log.txt", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            job.argv, stdout=log, stderr=subprocess.STDOUT, env=os.environ | threads, start_new_session=True
        )


def python_job(name: str, module: str, arguments: Sequence[str], folder: Path, done: Path, steps: int) -> Job:
    """A job that runs a module of this package with this interpreter."""
    return Job(name, (sys.executable, "-m", module, *arguments), folder, done, steps)


def last_record(folder: Path) -> dict:
    """The newest whole record of a metrics.jsonl, or an empty dict."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return {}


def _steps_done(jobs: Sequence[Job]) -> int:
    return sum(job.steps if job.done.exists() else last_record(job.folder).get("step", 0) for job in jobs)


def _left(jobs: Sequence[Job], began: float, at_start: int) -> str:
    done, total = _steps_done(jobs), sum(job.steps for job in jobs)
    seconds = time.monotonic() - began
    if done <= at_start or seconds < 5:
        return "..."
    return f"{(total - done) * seconds / (done - at_start) / 60:.1f} min left"


def _line(jobs: Sequence[Job], running: dict, began: float, at_start: int) -> str:
    finished = sum(job.done.exists() for job in jobs)
    parts = []
    for job in running:
        record = last_record(job.folder)
        parts.append(f"{job.name} {record.get('step', 0)}/{job.steps} loss {record.get('loss_nats', float('nan')):.3f}")
    return f"{finished}/{len(jobs)} done · {' · '.join(parts)} · {_left(jobs, began, at_start)}"


def _table(jobs: Sequence[Job], running: dict, began: float, at_start: int) -> Table:
    table = Table(
        title=f"{sum(job.done.exists() for job in jobs)}/{len(jobs)} runs done, {_left(jobs, began, at_start)}"
    )
    for column in ("run", "step", "loss (nats)", "tokens/CPU-s"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for job in jobs:
        record = last_record(job.folder)
        if job.done.exists():
            table.add_row(job.name, "done", "", "", style="dim")
        elif job in running:
            table.add_row(
                job.name,
                f"{record.get('step', 0)}/{job.steps}",
                f"{record['loss_nats']:.3f}" if record else "",
                f"{record['tokens_per_s']:,.0f}" if record else "starting",
            )
    return table


def _last_line(path: Path) -> str:
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1] if lines else f"see {path}"


def stop_on_terminate() -> None:
    """In a child: let SIGTERM, or the end of the parent however it came, end the process quietly; what was checkpointed stays."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()
