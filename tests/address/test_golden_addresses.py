"""Addresses are a file format: the published ones must come out exactly, by every path and every cut.

`golden_vectors.json` was computed by running the public reference code. Its hash ids are per head, ours are
rows of one table, so the published offsets are added.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nengram.address import Addresser, AddressSpec, reference
from nengram.address.dialects import half_bound

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_vectors.json").read_text())
MODULE = GOLDEN["module_forward"]
SETTINGS = {
    **GOLDEN["hash"],
    "module_forward": MODULE
    | {
        "cases": [
            {
                "desc": "module_forward",
                "compressed_ids": MODULE["input_ids"],
                "hash_ids": {"1": MODULE["results"]["hash_ids_layer1"]},
            }
        ]
    },
}
CASES = [
    pytest.param(name, case, id=f"{name}-{place}")
    for name, setting in SETTINGS.items()
    for place, case in enumerate(setting["cases"])
]


def spec_of(name: str) -> AddressSpec:
    setting = SETTINGS[name]
    return AddressSpec.engram(
        compressed_vocab_size=setting["layout"]["compressed_vocab_size"],
        rows_per_head=setting["config"]["engram_vocab_size"],
        heads=setting["config"]["n_head_per_ngram"],
        layer_ids=setting["config"]["layer_ids"],
        pad_cid=setting["layout"]["pad_id_after_mapping"],
        seed=setting["config"]["seed"],
    )


def golden_rows(name: str, case: dict) -> dict[int, np.ndarray]:
    layers = SETTINGS[name]["layout"]["layers"]
    return {
        int(layer): np.array(hashes) + np.array(layers[layer]["row_offsets"])
        for layer, hashes in case["hash_ids"].items()
    }


def assert_golden(rows: dict, name: str, case: dict) -> None:
    for layer_id, expected_BTS in golden_rows(name, case).items():
        np.testing.assert_array_equal(np.asarray(rows[layer_id]), expected_BTS)


@pytest.mark.parametrize("name", SETTINGS)
def test_layouts_are_the_published_ones(name):
    layout, spec = SETTINGS[name]["layout"], spec_of(name)
    assert spec.layer_ids == tuple(SETTINGS[name]["config"]["layer_ids"])
    assert half_bound(spec.compressed_vocab_size) == layout["half_bound"]
    for layer_id in spec.layer_ids:
        golden = layout["layers"][str(layer_id)]
        assert spec.multipliers(layer_id).tolist() == golden["multipliers"]
        assert [list(heads) for heads in spec.layer(layer_id).moduli] == golden["primes"]
        assert spec.offsets(layer_id).tolist() == golden["row_offsets"]
        assert spec.num_rows(layer_id) == golden["total_rows"]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_reference_gives_the_published_rows(name, case):
    spec = spec_of(name)
    rows = {
        layer.layer_id: [
            reference.table_rows(cids, multipliers=layer.multipliers, moduli=layer.moduli, pad_cid=spec.pad_cid)
            for cids in case["compressed_ids"]
        ]
        for layer in spec.layers
    }
    assert_golden(rows, name, case)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy-ids", "tensor-ids"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_whole_sequences_give_the_published_rows(name, case, kind, backend):
    cids_BT = kind(case["compressed_ids"])
    rows = Addresser(spec_of(name), backend=backend)(cids_BT)
    assert {type(rows_BTS) for rows_BTS in rows.values()} == {type(cids_BT)}
    assert_golden(rows, name, case)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_chunks_and_single_tokens_give_the_published_rows(name, case, chunk, backend):
    cids_BT = np.array(case["compressed_ids"])
    address = Addresser(spec_of(name), backend=backend)
    state = address.new_state(len(cids_BT))
    parts = [address(cids_BT[:, at : at + chunk], state=state) for at in range(0, cids_BT.shape[1], chunk)]
    assert_golden({id_: np.concatenate([part[id_] for part in parts], axis=1) for id_ in parts[0]}, name, case)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_restored_state_gives_the_published_rows(name, case, backend):
    cids_BT = np.array(case["compressed_ids"])
    cut = cids_BT.shape[1] // 2
    address = Addresser(spec_of(name), backend=backend)
    state = address.new_state(len(cids_BT))
    before = address(cids_BT[:, :cut], state=state)
    snapshot = state.snapshot()
    address(np.zeros_like(cids_BT), state=state)
    state.restore(snapshot)
    after = address(cids_BT[:, cut:], state=state)
    assert_golden({id_: np.concatenate([before[id_], after[id_]], axis=1) for id_ in before}, name, case)


def test_the_demo_has_the_published_multipliers_and_primes():
    spec = spec_of("demo_default_v3tok")
    assert half_bound(98_627) == 46_758_859_322_775
    assert spec.multipliers(1).tolist() == [76993395940407, 4862694818241, 36129212583461]
    assert spec.multipliers(15).tolist() == [29055444938695, 56284491166079, 54183298291715]
    assert spec.moduli(1).tolist()[:3] == [646403, 646411, 646421]
    assert spec.moduli(15).tolist()[-3:] == [646859, 646873, 646879]
    assert [spec.num_rows(layer_id) for layer_id in (1, 15)] == [10_344_164, 10_348_242]


def test_the_shipped_successor_has_the_published_row_counts_and_multipliers():
    spec = AddressSpec.engram(
        compressed_vocab_size=99_092,
        rows_per_head=[16_000_000] * 3,
        heads=8,
        layer_ids=[1, 14],
        pad_cid=2,
    )
    assert [spec.num_rows(layer_id) for layer_id in (1, 14)] == [384_006_168, 384_016_682]
    assert spec.multipliers(1).tolist() == [76632096046245, 4839876093313, 35959672319349, 73987337458391]
    assert spec.multipliers(14).tolist() == [67716810739261, 51510806800915, 30921347202721, 82619226485591]
    assert (spec.moduli(1)[0], spec.moduli(1)[-1]) == (16_000_057, 16_000_463)
    assert (spec.moduli(14)[0], spec.moduli(14)[-1]) == (16_000_477, 16_000_889)


@pytest.mark.parametrize(("rows", "billions"), [(2_262_400, 5.792), (7_239_680, 18.534)])
def test_the_papers_tables_have_the_papers_parameter_counts(rows, billions):
    spec = AddressSpec.engram(
        compressed_vocab_size=98_627, rows_per_head=[rows] * 2, heads=8, layer_ids=[2, 15], pad_cid=2
    )
    parameters = sum(spec.num_rows(layer_id) for layer_id in spec.layer_ids) * 80
    assert parameters / 1e9 == pytest.approx(billions, abs=1e-3)
