"""Where the gain lives: histories counted in what a run really read, classes that share out every token, parts that add up."""

import io
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from nengram.address import AddressSpec
from nengram.config import load_config
from nengram.errors import CheckpointError, ConfigError
from nengram.infer import load_run
from nengram.study import gain, reading
from nengram.study.history import (
    CLASSES,
    history_class,
    history_of,
    judged_positions,
    positions_of,
    trained_positions,
)
from nengram.study.token_classes import CLASSES as TOKEN_CLASSES
from nengram.study.token_classes import token_classes
from nengram.text import Entry, eval_windows, prepare
from nengram.text.pack import pack
from nengram.train import token_nats, train
from tests.conftest import TINY, recorded_batches, small_corpus


def trained_run(folder, data, *changes):
    """A run folder as a comparison leaves it; and every batch that its training loop was given."""
    config = load_config("demo", (*TINY, *changes))
    with recorded_batches() as seen:
        for _ in train(config, data, folder):
            pass
    nats_N = token_nats(load_run(folder).model, data.splits["test"], batch=4, context=32)
    save_file({"nats_N": nats_N}, folder / "test_nats.safetensors")
    return folder, seen


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """{arm: [(folder, batches) of seeds 0, 1, 2]}."""
    out = tmp_path_factory.mktemp("runs")
    return {
        arm: [
            trained_run(out / f"{arm}-s{seed}", data, f"budget.arm={arm}", f"train.seed={seed}") for seed in (0, 1, 2)
        ]
        for arm in ("engram", "moe")
    }


@pytest.fixture(autouse=True)
def its_corpus(data, monkeypatch):
    monkeypatch.setattr(reading, "prepare_for", lambda config: data)


@pytest.fixture(scope="module")
def folders(runs):
    return [[folder for folder, _ in runs[arm]] for arm in ("engram", "moe")]


@pytest.fixture(scope="module")
def found(folders, data):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "prepare_for", lambda config: data)
        return gain.gain_report(*folders)


def reads(batches, cids_V, order, pad_cid):
    """(n-gram, target, position of the target) of every position with a target, in plain Python."""
    for batch in batches:
        for b, t in np.ndindex(*batch.ids_BT.shape):
            ngram, begun = [], False
            for back in range(order):
                begun = begun or t - back < 0
                ngram.append(pad_cid if begun else int(cids_V[batch.ids_BT[b, t - back]]))
                begun = begun or bool(batch.start_BT[b, t - back])
            if batch.positions_BT[b, t] >= 0:
                yield tuple(ngram), int(batch.targets_BT[b, t]), int(batch.positions_BT[b, t])


def test_a_history_is_what_the_training_loop_was_given(runs, data):
    folder, seen = runs["engram"][1]
    run = load_run(folder)
    test, spec, cids_V = data.splits["test"], run.model.spec, run.compression.cids_V
    trained = trained_positions(run.config, data.splits["train"], run.facts["step"])
    assert np.array_equal(trained.ids_X, np.concatenate([batch.ids_BT.ravel() for batch in seen]))
    asked = judged_positions(run.config, test)
    for order, history in history_of(spec, cids_V, trained, asked).items():
        met = Counter(ngram for ngram, _, _ in reads(seen, cids_V, order, spec.pad_cid))
        followed = Counter((ngram, target) for ngram, target, _ in reads(seen, cids_V, order, spec.pad_cid))
        wanted = list(reads(eval_windows(test, batch=4, context=32), cids_V, order, spec.pad_cid))
        assert asked.positions_X.tolist() == [position for _, _, position in wanted]
        assert history.read_X.tolist() == [met[ngram] for ngram, _, _ in wanted]
        assert history.continued_X.tolist() == [followed[ngram, target] for ngram, target, _ in wanted]
        assert 0 < (history.read_X == 0).mean() < 1 and (history.continued_X < history.read_X).any()


def test_a_second_pass_counts_again_and_another_seed_reads_another_part(data):
    packed, config = data.splits["train"], load_config("demo", TINY)
    steps = (len(packed) - 1) // 128
    size = data.compression.compressed_vocab_size
    spec = AddressSpec.engram(
        compressed_vocab_size=size, rows_per_head=[50, 50], heads=1, layer_ids=[0], pad_cid=0, block_indices=[0]
    )
    once, twice = (trained_positions(config, packed, n) for n in (steps, 2 * steps))
    first, both = (history_of(spec, data.compression.cids_V, read, once)[2].read_X for read in (once, twice))
    assert np.median(both / first) == 2 and first.min() >= 1
    few, others = (trained_positions(config.replace(train__seed=seed), packed, 4) for seed in (0, 5))
    assert not np.array_equal(few.ids_X, others.ids_X)


def test_every_class_begins_where_its_name_says():
    assert [CLASSES[i] for i in history_class(np.array([0, 1, 3, 4, 31, 32, 10**6]))] == [
        *("never", "1-3", "1-3", "4-31", "4-31", "32+", "32+"),
    ]


def test_parts_of_every_split_add_up_to_the_whole_difference(found, folders, data):
    nats = [[gain.load_nats(folder).astype(np.float64) for folder in arm] for arm in folders]
    whole = [float(np.nanmean(a) - np.nanmean(b)) for a, b in zip(*nats, strict=True)]
    assert found["difference"]["differences"] == pytest.approx(whole)
    assert set(found["splits"]) == {f"{kind} {order}" for kind in ("read", "continued") for order in (2, 3)} | {
        "source",
        "token",
    }
    for split in found["splits"].values():
        parts = split["parts"].values()
        assert sum(row["share"] for row in parts) == pytest.approx(1)
        assert sum(row["share_of_gain"] for row in parts) == pytest.approx(1)
        for seed, difference in enumerate(whole):
            added = sum(row["contribution"]["differences"][seed] for row in parts)
            assert added == pytest.approx(difference, abs=1e-12)
        assert sum(row["share"] > 0 for row in parts) > 1


def test_a_part_is_the_mean_over_its_tokens(found, folders, data):
    test = data.splits["test"]
    source = test.sources.index("notes")
    mask_N = test.source_of(np.arange(len(test))) == source
    losses = [[np.nanmean(gain.load_nats(folder)[mask_N]) for folder in arm] for arm in folders]
    row = found["splits"]["source"]["parts"]["notes"]
    assert row["memory_nats"] == pytest.approx(np.mean(losses[0]), rel=1e-6)
    assert row["difference"]["differences"] == pytest.approx(np.subtract(*losses).tolist(), rel=1e-3, abs=1e-7)
    assert row["share"] == pytest.approx(mask_N[1:].mean())


def test_a_planted_effect_is_found_where_it_was_planted(folders, data, tmp_path, monkeypatch):
    """Give the memory runs the baseline's losses, but 0.5 nats off where the token is a number."""
    test = data.splits["test"]
    kind_N = token_classes(test, data.tokenizer, data.compression.cids_V, data.splits["train"])
    number_N = kind_N == TOKEN_CLASSES.index("number")
    theirs = {folder: gain.load_nats(other) - 0.5 * number_N for folder, other in zip(*folders, strict=True)}
    load_nats = gain.load_nats
    monkeypatch.setattr(gain, "load_nats", lambda folder: theirs.get(folder, load_nats(folder)))
    parts = gain.gain_report(*folders)["splits"]["token"]["parts"]
    assert parts["number"]["difference"]["mean"] == pytest.approx(-0.5, abs=1e-6)
    assert parts["number"]["share_of_gain"] == pytest.approx(1)
    assert all(
        row["contribution"]["mean"] == pytest.approx(0, abs=1e-9) for name, row in parts.items() if name != "number"
    )


def test_an_effect_on_what_was_never_read_is_found_there(runs, folders, data, monkeypatch):
    """The same, 0.5 nats off where the 2-gram before the token was not read by that seed's training."""
    cids_V, theirs, test = data.compression.cids_V, {}, data.splits["test"]
    for (folder, seen), other in zip(runs["engram"], folders[1], strict=True):
        met = {ngram for ngram, _, _ in reads(seen, cids_V, 2, 0)}
        theirs[folder] = gain.load_nats(other)
        for ngram, _, position in reads(eval_windows(test, batch=4, context=32), cids_V, 2, 0):
            theirs[folder][position] -= 0.5 * (ngram not in met)
    load_nats = gain.load_nats
    monkeypatch.setattr(gain, "load_nats", lambda folder: theirs.get(folder, load_nats(folder)))
    parts = gain.gain_report(*folders)["splits"]["read 2"]["parts"]
    assert parts["never"]["difference"]["differences"] == pytest.approx([-0.5] * 3, abs=1e-6)
    assert parts["never"]["share_of_gain"] == pytest.approx(1)


def classed(data, text, training=()):
    """[(token's text, class)] of one document, as tokens of the small corpus."""
    cids_V = data.compression.cids_V
    packed, train = (
        pack([Entry("key", "made", one) for one in texts], data.tokenizer, data.doc_id, ("made",))
        for texts in ([text], training or ["nothing."])
    )
    found = token_classes(packed, data.tokenizer, cids_V, train)
    texts = [data.tokenizer.decode([int(i)], skip_special_tokens=False) for i in packed.ids_N]
    return [(piece, TOKEN_CLASSES[kind]) for piece, kind in zip(texts, found, strict=True)]


def words_of(pairs, kind):
    return "".join(piece for piece, found in pairs if found == kind).strip()


def test_token_classes_by_their_rule(data):
    pairs = classed(data, "The xyzzy met Bucephalus. Zanzibar fell to Grace Hopper, 1845!")
    assert pairs[0] == ("<|doc|>", "punctuation")
    assert "".join(piece for piece, _ in pairs[1:]) == "The xyzzy met Bucephalus. Zanzibar fell to Grace Hopper, 1845!"
    assert words_of(pairs, "punctuation").replace(" ", "") == "<|doc|>.,!"
    assert words_of(pairs, "number").replace(" ", "") == "1845"
    word = next(kind for piece, kind in pairs if piece.strip().startswith("B"))
    inside, rest = words_of(pairs, "inside name"), words_of(pairs, "word rest")
    assert word == "word start" and inside.startswith("ucephalus")
    assert "anzibar" in rest and "anzibar" not in inside  # opens a sentence
    assert "Hopper".startswith(words_of(pairs, "phrase")) and words_of(pairs, "phrase")  # the second word of a name


def test_sentences_open_after_marks_and_line_ends_only(data):
    pairs = classed(data, "of Zeppelin\nZeppelin, Zeppelin (U.S. Zeppelin) v.Zeppelin")
    kinds = [kind for piece, kind in pairs if piece.endswith("n")]  # the last token of each
    assert kinds == ["inside name", "word rest", "inside name", "word rest", "inside name"]


def test_a_set_phrase_is_one_that_training_repeats(data):
    text = "it was a black hole again"
    often = ["we saw the black hole there."] * 6 + ["quite other words stand between them here."] * 60
    assert words_of(classed(data, text), "phrase") == ""
    assert words_of(classed(data, text, often), "phrase") == "hole"
    assert words_of(classed(data, text, often[2:]), "phrase") == ""  # four times are too few
    chance = ["black hole hole black black"] * 400  # both words everywhere: together by chance alone
    assert words_of(classed(data, text, chance), "phrase") == ""


def test_tables_json_and_picture(folders, found, tmp_path, capsys):
    console = Console(file=io.StringIO(), width=160)
    assert gain.run_gain(*folders, out=tmp_path, console=console) == found
    assert json.loads((tmp_path / "gain.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "gain.png").read_bytes()[:4] == b"\x89PNG"
    present = {part for split in found["splits"].values() for part, row in split["parts"].items() if row["share"]}
    assert {"notes", "never", "number", "phrase"} <= present
    for part in (*present, f"{found['difference']['mean']:+.4f}"):
        assert part in console.file.getvalue(), part
    gain.run_gain(*folders, as_json=True, console=console)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))


def test_one_pair_has_no_interval(folders):
    alone = gain.gain_report(folders[0][:1], folders[1][:1])
    assert alone["difference"]["low"] is None and alone["seeds"] == [0]
    console = Console(file=io.StringIO(), width=160)
    for table in gain.gain_tables(alone):
        console.print(table)
    assert "1 seed," in console.file.getvalue()


def test_runs_that_do_not_pair_are_refused_in_one_line(folders, data, tmp_path):
    memory, baseline = folders
    with pytest.raises(ConfigError, match="moe-s2: its seed 2 has no partner"):
        gain.gain_report(memory[:2], baseline)
    with pytest.raises(ConfigError, match=r"engram-s0 and .*engram-s0 are both of seed 0"):
        gain.gain_report([memory[0], memory[0]], baseline[:1])
    with pytest.raises(CheckpointError, match="moe-s0: this model has no memory layer"):
        gain.gain_report(baseline[:1], memory[:1])
    with pytest.raises(ConfigError, match="at least one run"):
        gain.gain_report([], baseline)
    with pytest.raises(CheckpointError, match="no run here"):
        gain.gain_report(memory[:1], [tmp_path])
    longer, _ = trained_run(tmp_path / "longer", data, "budget.arm=moe", "train.tokens=768")
    with pytest.raises(CheckpointError, match=r"engram-s0 and .*longer differ in their training tokens: 640 and 768"):
        gain.gain_report(memory[:1], [longer])
    (longer / "test_nats.safetensors").unlink()
    with pytest.raises(CheckpointError, match="longer: has no losses of its test tokens"):
        gain.gain_report(memory[:1], [longer])


def test_damaged_losses_are_refused_by_name(folders, tmp_path):
    shutil.copytree(folders[1][0], tmp_path / "cut")
    losses = tmp_path / "cut" / "test_nats.safetensors"
    losses.write_bytes(losses.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"cut/test_nats.safetensors: damaged .* run again"):
        gain.gain_report([folders[0][0]], [tmp_path / "cut"])


def test_runs_of_another_corpus_are_named_both(folders, data, tmp_path):
    other = prepare(small_corpus(200, seed=1), vocab_size=400, cache_folder=tmp_path)
    stranger, _ = trained_run(tmp_path / "stranger", other, "budget.arm=moe")
    with pytest.raises(CheckpointError, match=r"engram-s0 and .*stranger differ in their corpus: \w+-\w+-\w+ and \w+"):
        gain.gain_report(folders[0][:1], [stranger])


def test_positions_without_a_target_are_left_out(data):
    positions = positions_of(eval_windows(data.splits["test"], batch=4, context=32))
    assert sorted(positions.positions_X.tolist()) == list(range(1, len(data.splits["test"])))
    assert np.array_equal(data.splits["test"].ids_N[positions.positions_X], positions.targets_X)


def test_words_are_compared_without_case(data):
    often = ["Qux Vux!"] * 6 + ["quite other words stand between them here."] * 60
    assert words_of(classed(data, "a qux vux"), "phrase") == ""
    assert words_of(classed(data, "a qux vux", often), "phrase") == "vux"
