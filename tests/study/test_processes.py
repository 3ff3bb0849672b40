"""Jobs side by side: what is done is skipped, failures are told in one line, interrupts stop the children."""

import io
import sys
import time

import pytest
from rich.console import Console

from nengram.errors import NengramError
from nengram.study.processes import Job, last_record, run_jobs


def job(folder, name, code) -> Job:
    done = folder / name / "done"
    return Job(name, (sys.executable, "-c", code), folder / name, done, 1)


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_all_jobs_run_and_done_ones_are_not_run_again(tmp_path):
    jobs = [job(tmp_path, name, f"open(r'{tmp_path / name / 'done'}', 'a').write('x')") for name in "abc"]
    run_jobs(jobs, quiet(), at_once=2)
    run_jobs(jobs, quiet(), at_once=2)
    assert [j.done.read_text() for j in jobs] == ["x"] * 3


def test_a_failing_job_is_named_with_the_last_line_of_its_log(tmp_path):
    with pytest.raises(NengramError, match="b failed: no such corpus"):
        run_jobs([job(tmp_path, "b", "import sys; print('noise'); sys.exit('no such corpus')")], quiet())


def test_a_failure_stops_the_others(tmp_path):
    marker = tmp_path / "slow" / "done"
    slow = job(tmp_path, "slow", f"import time; time.sleep(30); open(r'{marker}', 'w')")
    began = time.monotonic()
    with pytest.raises(NengramError):
        run_jobs([slow, job(tmp_path, "bad", "raise SystemExit(1)")], quiet(), at_once=2)
    assert time.monotonic() - began < 20 and not marker.exists()


def test_a_job_sees_one_thread(tmp_path):
    code = f"import os; open(r'{tmp_path / 't' / 'done'}', 'w').write(os.environ['OMP_NUM_THREADS'])"
    run_jobs([one := job(tmp_path, "t", code)], quiet())
    assert one.done.read_text() == "1"


def test_the_last_whole_record_is_read_and_a_broken_line_skipped(tmp_path):
    assert last_record(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_record(tmp_path) == {"step": 2}
