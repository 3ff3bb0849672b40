"""The committed vectors are the reference's, every other source of truth agrees with them, and a damaged file is refused."""

import importlib.util
import json
from pathlib import Path

import pytest

from nengram.conform import DIALECTS, check, load
from nengram.conform.bugs import Steps, rows
from nengram.conform.cases import generate
from nengram.conform.own import Own
from nengram.conform.vectors import ABILITIES, dump, folder, parse
from nengram.errors import AddressError, DataError

ROOT = Path(__file__).parents[2]
PUBLIC = json.loads((ROOT / "tests" / "golden_vectors.json").read_text())["hash"]
SHARED = {  # settings that the public vectors have too
    "orders to 4, unequal sizes": "identity1000_ngram4_heads4_layers_0_3_7_seed1234",
    "bigrams only, one head": "identity1000_bigram_only_1head",
    "the public demo": "demo_default_v3tok",
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_committed_files_are_what_the_reference_says(dialect):
    path = ROOT / "conformance" / "v1" / f"{dialect}.json"
    assert path.read_text(encoding="utf-8") == dump(generate(dialect))
    assert path.stat().st_size < 300_000
    assert load(dialect) == generate(dialect)


def test_the_script_finds_nothing_to_change(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("conformance", ROOT / "scripts" / "conformance.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr("sys.argv", ["conformance.py", "--check"])
    assert script.main() == 0 and "nothing changed" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_fast_paths_give_every_vector_and_refuse_only_negative_ids(backend):
    for report in check(Own(backend)):
        assert report.clean, report.first("differs") or report.first("no answer")
        refused = {outcome.needs for outcome in report.outcomes if outcome.status == "not offered"}
        assert refused <= {("negative_ids",)}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_hash_by_steps_is_the_reference_while_no_step_is_replaced(dialect):
    for setting in load(dialect).settings:
        for case in setting.cases:
            assert tuple(rows(setting, case.calls, Steps())) == case.rows, (setting.name, case.name)


@pytest.mark.parametrize("name", SHARED)
def test_public_vectors_agree_where_both_ask(name):
    setting = next(setting for setting in load("engram").settings if setting.name == name)
    public = PUBLIC[SHARED[name]]
    asked = {json.dumps(case.calls[0]["ids"]): case for case in setting.cases}
    for layer in setting.spec.layers:
        golden = public["layout"]["layers"][str(layer.layer_id)]
        assert list(layer.multipliers) == golden["multipliers"]
        assert [list(heads) for heads in layer.moduli] == golden["primes"]
        assert layer.num_rows == golden["total_rows"]
        for case in public["cases"]:
            ours = asked.get(json.dumps(case["compressed_ids"]))
            if ours is not None:
                hashes = case["hash_ids"][str(layer.layer_id)]
                offsets = golden["row_offsets"]
                golden_rows = [
                    [[h + o for h, o in zip(slots, offsets, strict=True)] for slots in one] for one in hashes
                ]
                assert ours.rows[0][str(layer.layer_id)] == golden_rows
    both = asked.keys() & {json.dumps(case["compressed_ids"]) for case in public["cases"]}
    assert both or name == "the public demo"


def test_released_row_counts_are_in_the_files():
    released = {setting.name: setting.spec for dialect in DIALECTS for setting in load(dialect).settings}
    assert [layer.num_rows for layer in released["DeepSeek-V4.1-Flash"].layers] == [384_006_168, 384_016_682]
    assert [layer.num_rows for layer in released["Qwen3.8-Flash-Next"].layers] == [320_001_536]


def test_no_number_that_a_double_would_round_is_a_json_number():
    for dialect in DIALECTS:
        seen = []
        json.loads(
            (folder() / f"{dialect}.json").read_text(), parse_int=lambda digits, seen=seen: seen.append(int(digits))
        )
        assert max(seen) <= 2**53
        assert any(int(m) > 2**53 for setting in load(dialect).settings for m in setting.spec.layers[0].multipliers)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_boundary_is_asked_and_every_name_is_its_own(dialect):
    vectors = load(dialect)
    cases = [case for setting in vectors.settings for case in setting.cases]
    needed = {ability for case in cases for ability in case.needs}
    assert needed == set(ABILITIES) - (set() if dialect == "engram" else {"negative_ids"})
    lengths = {len(call["ids"][0]) for case in cases for call in case.calls}
    small = vectors.settings[0].spec
    assert {1, 2, small.max_order, small.max_order + 1, 40} <= lengths
    assert len(small.layers) == 2
    ids = {cid for case in vectors.settings[0].cases for call in case.calls for ids in call["ids"] for cid in ids}
    assert {0, small.compressed_vocab_size - 1, small.pad_cid} <= ids
    assert any(setting.spec.compressed_vocab_size == 2**31 - 1 for setting in vectors.settings)
    for setting in vectors.settings:
        names = [case.name for case in setting.cases]
        assert len(names) == len(set(names))


def test_an_unknown_dialect_and_a_damaged_file_are_refused(monkeypatch, tmp_path):
    with pytest.raises(DataError, match='did you mean "engram"'):
        load("engrma")
    text = (folder() / "engram.json").read_text()
    with pytest.raises(ValueError, match="format 2 is not known"):
        parse(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(AddressError, match="multipliers"):
        parse(text.replace('"multipliers":["', '"multipliers":["-', 1))
    monkeypatch.setattr("nengram.conform.vectors.folder", lambda: tmp_path)
    (tmp_path / "engram.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match="damaged"):
        load("engram")
    with pytest.raises(DataError, match="No such file"):
        load("qwen_ple")


def test_committed_results_are_of_these_vectors():
    paths = sorted((ROOT / "docs" / "conformance").glob("*.json"))
    assert [path.stem for path in paths] == ["engram-peft", "nengram", "transformers"]
    for path in paths:
        for dialect, found in json.loads(path.read_text(encoding="utf-8"))["dialects"].items():
            assert found["questions"] == len(load(dialect)), f"{path.name} is older than the vectors: ask again"
            answered = (
                found["passed"] + found["differs"] + found["no_answer"] + found["not_offered"] + found["not_asked"]
            )
            assert answered == found["questions"]
