"""A plan's numbers: released models by arithmetic, hit rates and reads by brute force, predictions by a real census."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from nengram.address import Addresser, AddressSpec, ngrams_of, take_census
from nengram.config import load_config
from nengram.errors import ConfigError, DataError, StoreError
from nengram.infer import plan_hits
from nengram.infer.plan import Budget, PlannedTables, PlanText, make_plan, placement_of
from nengram.infer.plan_hits import CHUNKS, trace_reads
from nengram.infer.plan_rates import ASSUMED, Ceiling, ceilings_of, rates_of
from nengram.infer.plan_rows import Growth, largest_rows, read_shares, recommend_rows, rows_for
from nengram.infer.plan_sizes import GIB, PAGE_BYTES, pages_per_row, sizes_of
from nengram.model.memories import address_spec
from nengram.store import HotSet
from nengram.store.codecs import CODECS
from nengram.text import prepare

SPEC = AddressSpec.engram(
    compressed_vocab_size=60, rows_per_head=[211, 307], heads=2, layer_ids=[1, 4], pad_cid=0, seed=3
)
TABLES = PlannedTables("small", SPEC, SPEC.layer_ids, 32, "fp8")
PLENTY = {name: Ceiling(value, "assumed") for name, (value, _) in ASSUMED.items()}


def zipf_text(tokens: int, vocab: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids of Zipf's law in which pairs and triples recur, and starts of documents of 100 ids on average."""
    rng = np.random.default_rng(seed)
    rank_T = np.minimum(rng.zipf(1.2, tokens), vocab) - 1
    step_T, follows_T = rng.integers(1, 4, tokens), rng.random(tokens) < 0.5
    ids_T = rank_T.copy()
    for t in range(1, tokens):
        if follows_T[t]:
            ids_T[t] = (ids_T[t - 1] * 31 + step_T[t]) % vocab
    start_T = rng.random(tokens) < 0.01
    start_T[0] = True
    return ids_T, start_T


def small_text(tokens: int = 3000, vocab: int = 60) -> PlanText:
    return PlanText(*zipf_text(tokens, vocab), *zipf_text(tokens // 4, vocab, seed=1), about="made up", proxy=False)


@pytest.mark.parametrize(
    ("preset", "rows", "parameters", "row_bytes", "table_bytes", "bytes_per_token"),
    [
        ("deepseek-v41-flash", [384_006_168, 384_016_682], 196_613_849_600, 264, 202_758_032_400, 12_672),
        ("qwen-ple", [320_001_536], 51_200_245_760, 160, 51_200_245_760, 2_560),
        ("engram-27b", [36_199_972, 36_204_260], 5_792_338_560, 160, 11_584_677_120, 5_120),
        ("engram-40b", [115_837_464, 115_841_428], 18_534_311_360, 160, 37_068_622_720, 5_120),
    ],
)
def test_released_models_come_out_by_arithmetic(preset, rows, parameters, row_bytes, table_bytes, bytes_per_token):
    config = load_config(preset)
    memory = config.memory
    spec = address_spec(memory, memory.compressed_vocab_size or config.model.vocab_size, memory.pad_id)
    sizes = sizes_of(PlannedTables(preset, spec, spec.layer_ids, memory.row_width, memory.codec))
    size = sizes.codecs[memory.codec]
    assert [layer.rows for layer in sizes.layers] == rows
    assert (sizes.rows, sizes.parameters) == (sum(rows), parameters)
    assert (size.row_bytes, size.table_bytes, size.bytes_per_token) == (row_bytes, table_bytes, bytes_per_token)
    assert sum(layer.table_bytes for layer in sizes.layers) == table_bytes
    assert sum(layer.bytes_per_token for layer in sizes.layers) == bytes_per_token


def test_released_sizes_as_they_are_quoted():
    """The paper's billions, Qwen's GiB, and what every slot of V4.1 reads."""
    config = load_config("deepseek-v41-flash")
    spec = address_spec(config.memory, config.memory.compressed_vocab_size, 2)
    tables = PlannedTables("v41", spec, spec.layer_ids, 256, "fp8")
    sizes = sizes_of(tables)
    assert tables.rows_per_token == sizes.rows_per_token == 48
    assert round(51_200_245_760 / GIB, 1) == 47.7 and round(sizes.codecs["fp8"].table_bytes / GIB, 2) == 188.83
    assert sizes.codecs["bf16"].bytes_per_token == 24_576 and sizes.codecs["fp8"].pages_per_token == 51
    assert (f"{5_792_338_560 / 1e9:.3f}", f"{18_534_311_360 / 1e9:.3f}") == ("5.792", "18.534")
    assert set(sizes.codecs) == set(CODECS)


@pytest.mark.parametrize("row_bytes", [1, 4, 130, 160, 256, 258, 264, 4095, 4096, 4097, 5000, 8192, 12_000])
def test_pages_of_a_row_equal_a_count_of_all_rows(row_bytes):
    first = np.arange(PAGE_BYTES) * row_bytes
    pages = (first + row_bytes - 1) // PAGE_BYTES - first // PAGE_BYTES + 1
    assert pages_per_row(row_bytes) == pages.mean()


def counted_rows(layer_id: int, text: PlanText) -> tuple[Counter, np.ndarray]:
    """Reads of each row by train, and the rows [T, S] that dev reads."""
    address = Addresser(SPEC)
    train, dev = (
        address(cids_T[None], start_BT=start_T[None])[layer_id][0]
        for cids_T, start_T in ((text.train_T, text.train_start_T), (text.dev_T, text.dev_start_T))
    )
    return Counter(train.ravel().tolist()), dev


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 1.0])
def test_hits_by_rows_equal_a_hot_set_that_is_asked(share):
    text = small_text()
    trace = trace_reads(TABLES, text)
    found = trace.hits(share)
    expected, exhausted = [], []
    for layer_id in SPEC.layer_ids:
        reads, asked_TS = counted_rows(layer_id, text)
        room = int(share * SPEC.num_rows(layer_id))
        hot = HotSet.from_counts(np.array(list(reads)), np.array(list(reads.values())), room)
        expected.append(np.isin(asked_TS, hot.rows_H))
        exhausted.append(room > len(reads))
    assert trace.method == "rows"
    assert found.all == pytest.approx(np.mean(expected))
    for order in (2, 3):
        in_order = SPEC.slot_orders == order
        assert found.by_order[order] == pytest.approx(np.mean([hot_TS[:, in_order] for hot_TS in expected]))
    assert found.exhausted == any(exhausted)


def test_hits_by_ngrams_equal_a_counter(monkeypatch):
    monkeypatch.setattr(plan_hits, "ROWS_COUNTED", 0)
    text = small_text()
    trace = trace_reads(TABLES, text)
    reads = Counter()
    for order in (2, 3):
        ngrams = ngrams_of(text.train_T, text.train_start_T, order).tolist()
        reads.update((order, *ngram) for ngram in ngrams)
    ranked = sorted(reads, key=lambda ngram: (-reads[ngram], ngram))  # as the counts are sorted, for equal ones
    for share in (0.05, 0.3):
        hot = set(ranked[: int(share * TABLES.num_rows / 2) // SPEC.heads])
        for order in (2, 3):
            asked = ngrams_of(text.dev_T, text.dev_start_T, order).tolist()
            rate = np.mean([(order, *ngram) in hot for ngram in asked])
            assert trace.hits(share).by_order[order] == pytest.approx(rate)
    assert trace.method == "n-grams"


def test_both_ways_agree_where_the_table_is_far_larger_than_the_text(monkeypatch):
    spec = AddressSpec.engram(compressed_vocab_size=60, rows_per_head=[10**6, 10**6], heads=2, layer_ids=[1], pad_cid=0)
    tables, text = PlannedTables("large", spec, (1,), 32, "fp8"), small_text()
    by_rows = trace_reads(tables, text)
    monkeypatch.setattr(plan_hits, "ROWS_COUNTED", 0)
    by_ngrams = trace_reads(tables, text)
    for share in (1e-5, 1e-4, 1e-3):
        assert by_rows.hits(share).all == pytest.approx(by_ngrams.hits(share).all, abs=0.02)
    for one, other in zip(by_rows.chunks(1e-4), by_ngrams.chunks(1e-4), strict=True):
        assert one.distinct_share == pytest.approx(other.distinct_share, abs=0.01)
        assert one.cold_rows_per_token == pytest.approx(other.cold_rows_per_token, abs=0.05)


def test_chunks_equal_sets_of_rows():
    text, share = small_text(tokens=9000), 0.1
    trace = trace_reads(TABLES, text)
    reads_asked = [counted_rows(layer_id, text) for layer_id in SPEC.layer_ids]
    tokens = len(text.dev_T)
    stretches = [range(first, first + 512) for first in range(0, tokens - 511, 512)]
    distinct = asked = cold = 0
    for (reads, asked_TS), layer_id in zip(reads_asked, SPEC.layer_ids, strict=True):
        room = int(share * SPEC.num_rows(layer_id))
        hot = HotSet.from_counts(np.array(list(reads)), np.array(list(reads.values())), room).rows_H.tolist()
        for stretch in stretches:
            rows = set(asked_TS[stretch].ravel().tolist())
            asked, distinct = asked + 512 * SPEC.slots, distinct + len(rows)
            cold += len(rows.difference(hot))
    chunks = {chunk.name: chunk for chunk in trace.chunks(share)}
    assert list(chunks) == list(CHUNKS)
    assert chunks["prefill 512"].distinct_share == pytest.approx(distinct / asked)
    assert chunks["prefill 512"].cold_rows_per_token == pytest.approx(cold / (512 * len(stretches)))
    assert chunks["prefill 4096"].tokens == tokens  # the dev split is shorter than that
    one = chunks["decode, batch 1"]
    assert one.distinct_share == 1
    assert one.cold_rows_per_token == pytest.approx(TABLES.rows_per_token * (1 - trace.hits(share).all))
    assert chunks["prefill 512"].distinct_share < chunks["decode, batch 8"].distinct_share < 1


def test_a_hit_rate_needs_both_splits():
    with pytest.raises(DataError, match="needs text in the train and the dev split"):
        trace_reads(TABLES, replace(small_text(), dev_T=np.zeros(0, np.int64)))


@pytest.mark.parametrize("codec", CODECS)
def test_tables_go_where_they_fit_and_no_budget_is_exceeded(codec):
    sizes, trace = sizes_of(TABLES), trace_reads(TABLES, small_text(tokens=400))
    size = sizes.codecs[codec].table_bytes

    def placed(device_bytes: int, host_bytes: int):
        return placement_of(codec, sizes.codecs[codec], sizes, Budget(device_bytes / GIB, host_bytes / GIB), trace)

    assert placed(size, 0).tier == "resident" and placed(size - 1, size).tier == "host"
    assert placed(0, 0).tier == "mapped" and placed(0, 0).disk_bytes == size
    before = 0
    for host_bytes in range(0, size, size // 7):
        one = placed(size - 1, host_bytes)
        assert one.tier in ("tiered", "mapped") and one.host_bytes <= host_bytes and one.hot_rows >= before
        assert one.hot_share == one.hot_rows / TABLES.num_rows and 0 <= one.hit_rate <= 1
        before = one.hot_rows
    last = placed(0, size - 1)
    assert last.tier == "tiered" and last.hot_rows < TABLES.num_rows
    assert last.host_bytes > last.hot_rows * sizes.codecs[codec].row_bytes  # the index takes room, too


@pytest.mark.parametrize("budget", [(-1.0, 0.0), (0.0, -0.1), (math.nan, 0.0), (0.0, math.inf)])
def test_wrong_budgets_are_refused(budget):
    with pytest.raises(ConfigError, match="must be a number of GiB from 0 up"):
        Budget(*budget)


def test_rates_are_amounts_against_ceilings_and_the_lowest_binds():
    ceilings = ceilings_of({"disk_iops": 1000.0}, {"host_rows_per_s": Ceiling(1e6, "measured")})
    assert ceilings["disk_iops"].source == "given" and ceilings["host_rows_per_s"].source == "measured"
    assert ceilings["link_gib_per_s"] == Ceiling(
        *[ASSUMED["link_gib_per_s"][0], "assumed", ASSUMED["link_gib_per_s"][1]]
    )
    size = sizes_of(TABLES).codecs["fp8"]
    chunk = trace_reads(TABLES, small_text()).chunks(0.1)[0]
    found = {
        tier: rates_of(size, rows_per_token=8, chunk=chunk, tier=tier, ceilings=ceilings)
        for tier in ("resident", "host", "tiered", "mapped")
    }
    assert found["resident"].tokens_per_s == {"device": ASSUMED["device_gib_per_s"][0] * GIB / size.bytes_per_token}
    assert set(found["host"].tokens_per_s) == {"link", "host"} and found["host"].binding == "host"
    disk = found["tiered"].tokens_per_s["disk"]
    assert disk == pytest.approx(1000 / (chunk.cold_rows_per_token * size.pages_per_row))
    assert found["tiered"].binding == "disk" and found["mapped"].tokens_per_s == found["tiered"].tokens_per_s
    nothing_cold = replace(chunk, cold_rows_per_token=0.0)
    rates = rates_of(size, rows_per_token=8, chunk=nothing_cold, tier="tiered", ceilings=ceilings)
    assert rates.tokens_per_s["disk"] is None and rates.binding == "host"


def test_a_ceiling_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="--disk-iops must be above 0, got 0"):
        make_plan(TABLES, small_text(), Budget(0, 0), PLENTY | {"disk_iops": Ceiling(0.0, "given")})


def test_an_unknown_codec_is_refused_with_the_nearest():
    with pytest.raises(StoreError, match='did you mean "fp8"'):
        replace(TABLES, codec="fp9")


def census_of(ids_T, start_T, rows, vocab=3000):
    """The real census of tables with `rows` rows a head, order by order."""
    spec = AddressSpec.engram(compressed_vocab_size=vocab, rows_per_head=rows, heads=4, layer_ids=[1], pad_cid=0)
    return take_census(spec, [(ids_T, start_T)]).orders


@pytest.mark.parametrize(("part", "close"), [(1, 0.02), (4, 0.05)])
def test_touched_rows_are_those_of_a_census(part, close):
    """Predicted from the whole text, and from its first quarter, held against the hash itself on all of it."""
    ids_T, start_T = zipf_text(60_000, 3000)
    known = len(ids_T) // part
    spectra = recommend_rows(ids_T[:known], start_T[:known], tokens=len(ids_T), max_order=3)
    for times in (0.5, 1, 2):
        rows = [int(times * largest_rows(spectrum)) for spectrum in spectra]
        for spectrum, census, number in zip(spectra, census_of(ids_T, start_T, rows), rows, strict=True):
            predicted = rows_for(spectrum, number)
            assert predicted.touched == pytest.approx(census.occupied, abs=close)
            assert predicted.taught == pytest.approx(census.well_touched, abs=close)
            assert predicted.ngrams_per_row == pytest.approx(census.oversubscription, rel=max(0.02, close))
    assert (spectra[0].beyond > 1) == (part > 1)


def test_the_recommendation_is_the_most_rows_that_are_taught():
    for spectrum in recommend_rows(*zipf_text(30_000, 3000), tokens=20_000, max_order=4):
        rows = largest_rows(spectrum)
        assert read_shares(spectrum, rows)[1] >= 0.5 > read_shares(spectrum, int(rows * 1.01) + 2)[1]
        assert largest_rows(spectrum, taught=0.9) < rows


def test_more_text_teaches_more_rows_and_growth_slows():
    growth = Growth(*zipf_text(30_000, 3000), 3)
    spectra = [growth.spectrum(tokens) for tokens in (5_000, 30_000, 120_000, 10**7, 10**12)]
    distinct = [spectrum.distinct for spectrum in spectra]
    rows = [largest_rows(spectrum) for spectrum in spectra]
    assert distinct == sorted(distinct) and rows == sorted(rows) and rows[0] < rows[-1]
    for spectrum in spectra:
        assert spectrum.distinct <= spectrum.tokens and spectrum.few_C.sum() <= spectrum.distinct * (1 + 1e-9)
        touched, taught = read_shares(spectrum, 1000)
        assert 0 <= taught <= touched <= 1


@pytest.mark.parametrize(("tokens", "line"), [(0, "--tokens must be 1 or more"), (3, "--tokens 3 teaches no table")])
def test_a_budget_that_teaches_nothing_is_refused(tokens, line):
    with pytest.raises(ConfigError, match=line):
        recommend_rows(*zipf_text(5_000, 3000), tokens=tokens, max_order=3)


def test_growth_needs_documents():
    ids_T, start_T = zipf_text(500, 60)
    start_T[1:] = False
    with pytest.raises(DataError, match="1 documents: growth needs 16"):
        Growth(ids_T, start_T, 2)


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2, 4, 8])
def test_touched_rows_of_real_text_are_those_of_a_census(part, tmp_path):
    """The bundled text, known in part: rows touched within 2 points, rows read 8 times within 8."""
    data = prepare("bundled", vocab_size=4096, cache_folder=tmp_path)
    ids_T = data.compression(data.splits["train"].ids_N.astype(np.int64))
    start_T = np.zeros(len(ids_T), dtype=bool)
    start_T[data.splits["train"].doc_starts_D] = True
    whole = Growth(ids_T, start_T, 2)
    known = len(ids_T) // part
    spectra = recommend_rows(whole.cids_T[:known], whole.start_T[:known], tokens=len(ids_T), max_order=3)
    rows = [largest_rows(spectrum) for spectrum in spectra]
    for spectrum, census, number in zip(spectra, census_of(ids_T, start_T, rows, vocab=4096), rows, strict=True):
        predicted = rows_for(spectrum, number)
        assert predicted.touched == pytest.approx(census.occupied, abs=0.02)
        assert predicted.taught == pytest.approx(census.well_touched, abs=0.08)
