"""What was counted is what was asked: by label, by tier, added up, from any thread."""

import json
import threading

import numpy as np
import pytest

from nengram.errors import StoreError
from nengram.store import Counters

LABELS = [("trigram", 100, 300), ("bigram", 0, 100)]


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def filled() -> Counters:
    counters = Counters(LABELS)
    counters.request(rows(5, 5, 150, 299, 300), rows(5, 150, 299, 300))
    counters.served("hot", rows(5), bytes_U=64)
    counters.served("disk", rows(150, 299, 300), bytes_U=np.array([4096, 0, 8192]), reads_U=np.array([1, 0, 2]))
    counters.stalled("disk", 0.25)
    return counters


def test_each_row_counts_for_its_label_and_tier():
    found = filled().to_dict()
    assert list(found["labels"]) == ["bigram", "trigram", "unlabelled"]  # as the rows lie
    assert found["labels"]["bigram"] == {
        "rows": 2,
        "distinct": 1,
        "tiers": {"hot": {"hits": 1, "reads": 1, "bytes": 64}, "disk": {"hits": 0, "reads": 0, "bytes": 0}},
    }
    assert found["labels"]["trigram"]["tiers"]["disk"] == {"hits": 2, "reads": 1, "bytes": 4096}
    assert found["labels"]["unlabelled"]["rows"] == 1
    assert found["total"]["tiers"]["disk"] == {"hits": 3, "reads": 3, "bytes": 12288}
    assert found["requests"] == 1 and found["stalled_s"] == {"disk": 0.25}
    assert json.loads(json.dumps(found)) == found


def test_without_labels_everything_is_unlabelled():
    counters = Counters()
    assert counters.to_dict() == {
        "requests": 0,
        "stalled_s": {},
        "total": {"rows": 0, "distinct": 0, "tiers": {}},
        "labels": {},
    }
    counters.request(rows(1, 1), rows(1))
    assert counters.to_dict()["labels"]["unlabelled"]["rows"] == 2


def test_merged_counts_are_sums():
    one, other = filled(), filled()
    other.served("page cache", rows(7))
    one.merge(other)
    found = one.to_dict()
    assert found["requests"] == 2 and found["total"]["rows"] == 10
    assert found["total"]["tiers"]["disk"]["bytes"] == 2 * 12288
    assert found["total"]["tiers"]["page cache"]["hits"] == 1
    assert found["stalled_s"] == {"disk": 0.5}
    assert other.to_dict()["requests"] == 1
    with pytest.raises(StoreError, match="other labels"):
        one.merge(Counters())


def test_an_inner_view_counts_what_it_serves_and_not_what_it_is_asked():
    counters = Counters(LABELS)
    inner = counters.inner()
    inner.request(rows(1), rows(1))
    inner.served("disk", rows(1))
    inner.stalled("disk", 1.0)
    found = counters.to_dict()
    assert (found["requests"], found["total"]["rows"], found["total"]["tiers"]["disk"]["hits"]) == (0, 0, 1)
    assert found["stalled_s"] == {"disk": 1.0}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([("a", 5, 5)], "no rows"),
        ([("a", -1, 5)], "no rows"),
        ([("a", 0, 6), ("b", 5, 9)], 'labels "a" and "b" overlap at row 5'),
        ([("a", 0, 5), ("a", 5, 9)], "given twice"),
        ([("unlabelled", 0, 5)], "given twice, or is called unlabelled"),
    ],
)
def test_labels_that_mean_nothing_are_refused(labels, words):
    with pytest.raises(StoreError, match=words):
        Counters(labels)


def test_threads_lose_no_count():
    counters = Counters(LABELS)

    def count():
        for _ in range(300):
            counters.request(rows(1, 150), rows(1, 150))
            counters.served("disk", rows(1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = counters.to_dict()
    assert found["requests"] == 1200 and found["total"]["tiers"]["disk"]["hits"] == 1200
