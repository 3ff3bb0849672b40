"""The meter reads from a run's metrics what the lookup contributes, and draws it."""

import json

import numpy as np
import pytest

from nengram.errors import CheckpointError
from nengram.study.meter import draw_meter, meter_of


def write(folder, records):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_lookup_is_worth_what_permuting_its_rows_costs(tmp_path):
    folder = write(
        tmp_path / "a",
        [
            {"tokens": 10, "dev_nats": None, "dev_nats_permuted": None},
            {"tokens": 20, "dev_nats": 5.0, "dev_nats_permuted": 5.25},
            {"tokens": 30, "dev_nats": 4.0},  # a record from before there was a meter
        ],
    )
    meter = meter_of(folder)
    np.testing.assert_array_equal(meter.tokens_P, [20, 30])
    np.testing.assert_array_equal(meter.lookup_nats_P, [0.25, np.nan])
    picture = draw_meter({"<engram>": [meter, meter], "moe": [meter]}, tmp_path / "m.png", pass_tokens=25)
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("records, message", [([], "never looked at dev"), ([{"tokens": 1}], "no metrics of a run")])
def test_a_run_without_looks_says_so(tmp_path, records, message):
    with pytest.raises(CheckpointError, match=message):
        meter_of(write(tmp_path / "b", records))
    with pytest.raises(CheckpointError, match="no metrics"):
        meter_of(tmp_path / "nowhere")
