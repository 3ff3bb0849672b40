"""Training beside a frozen model: cached halves are the whole, arms are as large as they say, controls control, recall counts right."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nengram.errors import CheckpointError, ConfigError, DataError
from nengram.hf import recall
from nengram.hf.adapter import load_adapter, save_adapter
from nengram.hf.arms import ARMS, Sizes, make_arm
from nengram.hf.gguf import convert_gguf, smollm2
from nengram.hf.lora import Lora, linears_of, ranks_for
from nengram.hf.recall import Fact, ask, find_facts, recall_table, score, sentences, sheet_of
from nengram.hf.retrofit import Windows, by_source, chunks, train_arm, window_nats
from nengram.hf.retrofit_runs import Design, Material, append_row, best_rates, rates_left, read_rows, run_all, runs_left
from nengram.hf.suffix import Suffix, cached
from nengram.hf.vocabulary import compression_of
from nengram.text import Entry

VOCAB, CONTEXT, BLOCK = 96, 12, 2
SIZES = Sizes(rows_per_head=500, heads=2, row_width=4)


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    ).eval()


@pytest.fixture
def suffix() -> Suffix:
    return Suffix(llama(), BLOCK)


def windows(suffix: Suffix, count: int, seed: int = 0) -> Windows:
    """Random ids in two sources, a quarter of the vocabulary so that n-grams repeat."""
    ids_NT = np.random.default_rng(seed).integers(0, VOCAB // 4, (count, CONTEXT + 1))
    hidden_NTD = suffix.before(torch.from_numpy(ids_NT[:, :-1])).numpy()
    return Windows(ids_NT, hidden_NTD, tuple("ab"[n % 2] for n in range(count)))


def arm_of(name: str, suffix: Suffix, text: Windows, **options):
    return make_arm(name, suffix, np.arange(VOCAB), text.ids_NT[:, :-1], sizes=SIZES, **options)


# Suffix


def test_the_halves_are_the_whole_bit_for_bit(suffix):
    ids_BT = torch.randint(VOCAB, (3, CONTEXT))
    hidden_BTD = suffix.before(ids_BT)
    with torch.no_grad():
        whole = suffix.whole(ids_BT).logits
        assert torch.equal(suffix(hidden_BTD), whole)
        assert torch.equal(suffix.rest.get_output_embeddings()(suffix.normed(hidden_BTD)), whole)
    assert not any(parameter.requires_grad for parameter in suffix.whole.parameters())


def test_cached_states_are_the_model_s_and_computed_once(suffix, tmp_path, monkeypatch):
    ids_NT = np.random.default_rng(0).integers(0, VOCAB, (5, CONTEXT))
    first = cached(suffix, ids_NT, tmp_path, "model", batch=2)
    assert np.array_equal(first, suffix.before(torch.from_numpy(ids_NT)).numpy())
    monkeypatch.setattr(Suffix, "before", None)
    assert np.array_equal(cached(suffix, ids_NT, tmp_path, "model"), first)
    with pytest.raises(TypeError):
        cached(suffix, ids_NT, tmp_path, "another model")
    assert len(list(tmp_path.iterdir())) == 1  # nothing half-written
    next(tmp_path.iterdir()).write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="remove it"):
        cached(suffix, ids_NT, tmp_path, "model")


def test_a_model_that_cannot_be_cut_is_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=2, n_positions=32)).eval()
    with pytest.raises(ConfigError, match="cannot be cut before block 1"):
        Suffix(gpt2, 1)  # its positions would be added twice
    with pytest.raises(ConfigError, match="a model of 4 blocks is cut before block 1 to 3"):
        Suffix(llama(), 4)


# Arms


def test_every_arm_begins_as_the_model(suffix):
    text = windows(suffix, 4)
    plain = suffix(torch.from_numpy(text.hidden_NTD))
    for name in ARMS:
        with arm_of(name, suffix, text) as arm, torch.no_grad():
            step = arm.begin(torch.from_numpy(text.ids_NT[:, :-1]))
            assert torch.equal(suffix(arm(torch.from_numpy(text.hidden_NTD), step)), plain), name
    assert not any(module._forward_hooks for module in linears_of(suffix.blocks).values())


def test_arms_have_the_parameters_that_they_are_compared_at(suffix):
    text = windows(suffix, 8)
    counts = {}
    for name in ARMS:
        with arm_of(name, suffix, text) as arm:
            counts[name] = arm.counts(text.ids_NT[:, :-1])
    total, touched = counts["graft"]["total"], counts["graft"]["touched"]
    smallest = min(m.in_features + m.out_features for m in linears_of(suffix.blocks).values())
    assert counts["one_row"]["total"] == counts["misaligned"]["total"] == total
    assert touched == counts["misaligned"]["touched"] < total
    assert counts["one_row"]["touched"] == total - arm_of("graft", suffix, text).memory.table_parameters + 4 * 4
    assert total - smallest < counts["lora_total"]["total"] <= total
    assert total - smallest < counts["graft_lora"]["total"] <= total
    assert touched - smallest < counts["lora_touched"]["total"] <= touched
    assert total - 2 * suffix.width < counts["mlp"]["total"] <= total
    with pytest.raises(ConfigError, match=r'unknown arm "grafd" \(did you mean "graft"'):
        arm_of("grafd", suffix, text)


def test_the_update_is_an_engram_s_before_the_block(suffix):
    """As a hook in the whole model, which is what a graft is."""
    text = windows(suffix, 4)
    with arm_of("graft", suffix, text) as arm:
        arm.memory.store.weight.normal_(generator=torch.Generator().manual_seed(0))
        ids_BT = torch.from_numpy(text.ids_NT[:, :-1])
        with torch.no_grad(), arm.begin(ids_BT) as step:
            mine = suffix(arm(torch.from_numpy(text.hidden_NTD), step))
            vecs_BTSE = step.vectors(BLOCK)

            def add(_, args):
                return (args[0] + arm.memory.engram(vecs_BTSE, args[0].unsqueeze(2)).squeeze(2), *args[1:])

            hook = suffix.blocks[0].register_forward_pre_hook(add)
            whole = suffix.whole(ids_BT).logits
            hook.remove()
    assert torch.equal(mine, whole) and not torch.equal(mine, suffix.whole(ids_BT).logits)


def test_an_arm_becomes_a_graft_of_the_model(suffix, tmp_path):
    """Trained beside the model, put into it: the same logits, and an adapter that can be saved and loaded."""
    text, tokenizer = windows(suffix, 8), word_tokenizer([f"word{n}" for n in range(VOCAB - 1)])
    cids_V = compression_of(tokenizer, VOCAB).cids_V
    arm = make_arm("graft", suffix, cids_V, text.ids_NT[:, :-1], sizes=SIZES)
    train_arm(arm, suffix, text, lr=1e-2, tokens=8 * CONTEXT, batch=2)
    ids_BT = torch.from_numpy(text.ids_NT[:, :-1])
    with torch.no_grad(), arm.begin(ids_BT) as step:
        mine = suffix(arm(torch.from_numpy(text.hidden_NTD), step))
        plain = suffix.whole(ids_BT).logits
        owner = arm.memory.as_graft(suffix.whole, tokenizer)
        assert torch.allclose(suffix.whole(ids_BT).logits, mine, atol=1e-5) and not torch.allclose(
            plain, mine, atol=1e-3
        )
        save_adapter(suffix.whole, tmp_path / "adapter")
        with owner.disabled():
            assert torch.equal(suffix.whole(ids_BT).logits, plain)
        again = llama()
        load_adapter(again, tmp_path / "adapter")
        assert torch.equal(again(ids_BT).logits, suffix.whole(ids_BT).logits)


def test_one_row_looks_nothing_up_and_misaligned_looks_up_another_s(suffix):
    text = windows(suffix, 4)
    ids_BT = torch.from_numpy(text.ids_NT[:, :-1])
    rows = {}
    for name in ("graft", "one_row", "misaligned"):
        with arm_of(name, suffix, text).begin(ids_BT) as step:
            rows[name] = step.rows[BLOCK]
    assert len(rows["one_row"].unique()) == 4 < len(rows["graft"].unique())
    assert torch.equal(rows["misaligned"], rows["graft"].roll(1, dims=0))
    assert not torch.equal(rows["misaligned"], rows["graft"])


def test_no_chunk_is_left_with_one_sequence():
    assert [len(chunk) for chunk in chunks(9, 4)] == [3, 3, 3]
    assert np.array_equal(np.concatenate(chunks(9, 4)), np.arange(9))


@pytest.mark.parametrize("name", [name for name in ARMS if name != "none"])
def test_every_arm_learns_and_leaves_the_model_alone(suffix, name):
    text = windows(suffix, 64)
    before = {key: value.clone() for key, value in suffix.whole.state_dict().items()}
    with arm_of(name, suffix, text) as arm:
        start = window_nats(arm, suffix, text)
        train_arm(arm, suffix, text, lr=3e-2, tokens=64 * CONTEXT, batch=2, seed=1)
        assert window_nats(arm, suffix, text).mean() < start.mean() - 0.05
    assert all(torch.equal(value, suffix.whole.state_dict()[key]) for key, value in before.items())


def test_window_nats_is_the_model_s_loss(suffix):
    text = windows(suffix, 5)
    with arm_of("none", suffix, text) as arm:
        nats_N = window_nats(arm, suffix, text, batch=2)
    ids_NT = torch.from_numpy(text.ids_NT)
    logits = suffix.whole(ids_NT[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids_NT[:, 1:], reduction="none").mean(1)
    assert np.allclose(nats_N, loss, atol=1e-6)
    assert by_source(nats_N, text.sources)["b"] == pytest.approx(nats_N[1::2].mean())


def test_more_tokens_than_there_are_is_refused(suffix):
    text = windows(suffix, 4)
    with pytest.raises(ConfigError, match="there are 4 windows"):
        train_arm(arm_of("mlp", suffix, text), suffix, text, lr=1e-3, tokens=100 * CONTEXT)


# LoRA


def test_lora_is_peft_s():
    from peft import LoraConfig, get_peft_model

    names = [f"model.layers.{i}.{m}" for i in (2, 3) for m in ("self_attn.q_proj", "mlp.down_proj")]
    theirs = get_peft_model(
        llama(), LoraConfig(r=3, lora_alpha=6, target_modules=names, init_lora_weights=False)
    ).eval()
    mine = llama()
    linears = {name: mine.get_submodule(name) for name in names}
    lora = Lora(linears, dict.fromkeys(names, 3), scale=2.0)
    for name in names:
        module = theirs.base_model.model.get_submodule(name)
        lora.down[name.replace(".", "_")].data.copy_(module.lora_A["default"].weight.data)
        lora.up[name.replace(".", "_")].data.copy_(module.lora_B["default"].weight.data)
    ids_BT = torch.randint(VOCAB, (2, CONTEXT))
    with torch.no_grad():
        assert torch.allclose(mine(ids_BT).logits, theirs(ids_BT).logits, atol=1e-5)
        assert not torch.allclose(mine(ids_BT).logits, llama()(ids_BT).logits, atol=1e-2)
        lora.remove()
        assert torch.equal(mine(ids_BT).logits, llama()(ids_BT).logits)


def test_ranks_spend_a_budget_to_the_last_rank():
    linears = {"a": torch.nn.Linear(4, 6), "b": torch.nn.Linear(4, 8), "c": torch.nn.Linear(2, 3)}
    assert ranks_for(linears, 27 + 12) == {"a": 2, "b": 1, "c": 1}
    assert ranks_for(linears, 27 * 3 + 17) == {"a": 4, "b": 4, "c": 2}  # c has no more
    assert ranks_for(linears, 10**9) == {"a": 4, "b": 4, "c": 2}
    with pytest.raises(ConfigError, match="do not pay"):
        ranks_for(linears, 4)


# Recall


PLANTED = [Fact("capital", f"land{n}", f"town{n}", n % 2 == 0) for n in range(8)]


def word_tokenizer(texts: list[str]) -> Tokenizer:
    words = {word: 1 for text in texts for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)}
    vocab = {"[UNK]": 0} | {word: place + 1 for place, word in enumerate(words)}
    assert len(vocab) <= VOCAB
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def planted_sheet(seed: int = 0):
    questions = ask(PLANTED, seed)
    return sheet_of(
        questions, word_tokenizer([q.prompt for q in questions] + [a for q in questions for a in q.answers])
    )


def test_recall_is_scored_as_the_model_itself_would(suffix):
    """Against log-probabilities of the whole model, prompt by prompt and unpadded."""
    sheet = planted_sheet()
    hidden = suffix.before(torch.from_numpy(sheet.ids_RT)).numpy()
    with arm_of("none", suffix, windows(suffix, 2)) as arm:
        scores = score(arm, suffix, sheet, hidden, batch=5)
    nats_R, exact_R = [], []
    for ids_T, begin, end in zip(sheet.ids_RT, sheet.begin_R, sheet.end_R, strict=True):
        logits_TV = suffix.whole(torch.from_numpy(ids_T[:end])[None]).logits[0].log_softmax(-1)
        answer = ids_T[begin:end].tolist()
        at = range(begin - 1, end - 1)
        nats_R.append(-sum(logits_TV[t, token].item() for t, token in zip(at, answer, strict=True)))
        exact_R.append([int(logits_TV[t].argmax()) for t in at] == answer)
    nats_QK = np.array(nats_R).reshape(-1, 4)
    assert np.allclose(scores["nats"], nats_QK[:, 0], atol=1e-5)
    assert (scores["chosen"] == (nats_QK.argmin(1) == 0)).all()
    assert (scores["exact"] == np.array(exact_R).reshape(-1, 4)[:, 0]).all()


def test_a_model_that_knows_the_answers_scores_full_marks(suffix):
    sheet = planted_sheet()
    hidden = np.zeros((*sheet.ids_RT.shape, suffix.width), np.float32)

    class Knows(torch.nn.Linear):
        """A head that reads the next id, which `normed` below puts in its input."""

        def forward(self, ids):
            return torch.nn.functional.one_hot(ids[..., 0].long(), VOCAB).float() * 20

    right = {
        tuple(sheet.ids_RT[4 * q + k, : sheet.begin_R[4 * q]]): sheet.ids_RT[4 * q]
        for q in range(len(sheet.questions))
        for k in range(4)
    }
    knows, arm = Knows(1, 1), arm_of("none", suffix, windows(suffix, 2))
    order_R = np.argsort(sheet.end_R, kind="stable")
    suffix.rest.get_output_embeddings = lambda: knows
    seen = iter(order_R)

    def normed(hidden_BTD):
        rows = [next(seen) for _ in hidden_BTD]
        known = [right[tuple(sheet.ids_RT[r, : sheet.begin_R[r]])][1 : hidden_BTD.shape[1] + 1] for r in rows]
        return torch.tensor(np.array([np.pad(k, (0, hidden_BTD.shape[1] - len(k))) for k in known]))[..., None]

    suffix.normed = normed
    scores = score(arm, suffix, sheet, hidden, batch=7)
    assert scores["chosen"].all() and scores["exact"].all() and scores["nats"].max() < 1e-3
    table = recall_table(sheet, scores)
    assert table["all/known/near"] == {"questions": 4, "chosen": 1.0, "exact": 1.0, "nats": pytest.approx(0, abs=1e-3)}
    assert table["capital/never/far"]["questions"] == 4 and "all/never/shown" not in table


def test_questions_have_one_right_answer_and_three_of_the_relation():
    questions = ask(PLANTED)
    assert len(questions) == 4 * 3 + 4 * 2
    for question in questions:
        assert question.answers[0] == question.fact.answer and len(set(question.answers)) == 4
        assert set(question.answers) <= {fact.answer for fact in PLANTED}
        assert question.fact.subject in question.prompt and question.fact.answer not in question.prompt
    with pytest.raises(DataError, match="too few"):
        ask(PLANTED[:3])


def test_no_asked_form_was_trained_but_the_shown_one():
    for relation, forms in recall.ASKED.items():
        trained = [form.split("{a}")[0].rstrip() for form in recall.TRAINING[relation]]
        assert forms["shown"] in trained and forms["near"] not in trained and forms["far"] not in trained
        ends = [form[form.index("{s}") :] for form in (forms["near"], *trained)]  # what a 3-gram sees before the answer
        assert ends[0] in ends[1:]


def test_sentences_state_shown_facts_evenly():
    said = sentences(PLANTED, recall.TRAINING, np.random.default_rng(0))
    first = [next(said) for _ in range(8 * 4)]
    assert len(set(first)) == 32 and sorted(next(said) for _ in range(32)) == sorted(first)


def test_facts_are_read_from_the_two_sources():
    entries = [
        Entry("Angola: Capital", "factbook", "Angola. Capital: name: Luanda\ngeographic coordinates: 8 50 S"),
        Entry("Albania: Capital", "factbook", "Albania. Capital: name: Tirana (Tirane)\ntime difference: UTC+1"),
        Entry("Monaco: Capital", "factbook", "Monaco. Capital: name: Monaco\ntime difference: UTC+1"),
        Entry(
            "Aalto",
            "wordnet",
            "Aalto, Alvar Aalto, Hugo Alvar Henrik Aalto: Finnish architect and designer (1898-1976).",
        ),
        Entry("dog", "wordnet", "dog, domestic dog: a member of the genus Canis."),
    ]
    facts = find_facts(entries)
    assert {(f.relation, f.subject, f.answer) for f in facts} == {
        ("capital", "Angola", "Luanda"),
        ("person", "Alvar Aalto", "Finnish architect"),
    }
    assert facts[0].stated_in("Luanda is in Angola") and not facts[0].stated_in("Luanda")
    many = [Entry(f"L{n}: Capital", "factbook", f"L{n}. Capital: name: Town{chr(65 + n)}") for n in range(20)]
    assert sum(f.shown for f in find_facts(many)) == 10 and find_facts(many, 6) == find_facts(many)[:6]


# Runs


@pytest.fixture
def setting(suffix):
    """A design of three arms, and its material."""
    sheet = planted_sheet()
    hidden = suffix.before(torch.from_numpy(sheet.ids_RT)).numpy()
    text = windows(suffix, 16)
    material = Material(text, windows(suffix, 4, 1), windows(suffix, 4, 2), sheet, hidden)
    design = Design(
        arms=("none", "graft", "lora_total"),
        seeds=(0, 1),
        tokens=16 * CONTEXT,
        batch=2,
        rates=(1e-3, 1e-2),
        sizes=SIZES,
    )
    return design, suffix, np.arange(VOCAB), material


def results(rows: list[dict]) -> list[dict]:
    """Rows without what differs between any two runs."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "train_seconds", "environment")} for row in rows]


def test_a_comparison_that_was_killed_goes_on_to_the_same_rows(setting, tmp_path):
    whole = list(run_all(*setting, tmp_path / "whole.jsonl", say=lambda _: None))
    assert [row["kind"] for row in whole] == ["tune"] * 4 + ["run"] * 5
    assert len({(row["arm"], row["seed"]) for row in whole if row["kind"] == "run"}) == 5
    path, stopped = tmp_path / "killed.jsonl", 0
    while runs_left(setting[0], read_rows(path)):
        next(run_all(*setting, path, say=lambda _: None))
        with open(path, "a") as file:
            file.write('{"kind": "run", "ar')  # killed while it wrote
        stopped += 1
    assert stopped == 9 and results(read_rows(path)) == results(whole) == results(read_rows(tmp_path / "whole.jsonl"))


def test_every_arm_runs_at_its_own_best_rate(setting):
    design = setting[0]

    def tuned(arm: str, lr: float, nats: float) -> dict:
        return {"kind": "tune", "arm": arm, "seed": 99, "lr": lr, "design": design.digest, "dev_nats": nats}

    rows = [tuned("graft", 1e-3, 3.0), tuned("graft", 1e-2, 2.0), tuned("lora_total", 1e-3, float("nan"))]
    assert best_rates(design, rows) == {"graft": 1e-2, "none": 0.0}
    left = runs_left(design, rows)
    assert [(run.kind, run.arm, run.lr) for run in left[:2]] == [("tune", "lora_total", 1e-2), ("run", "none", 0.0)]
    assert best_rates(design, [*rows, tuned("lora_total", 1e-2, 9.0)])["lora_total"] == 1e-2


def test_an_arm_whose_best_rate_is_at_an_end_is_tried_beyond_it(setting):
    design, rows, tried = replace(setting[0], arms=("graft",), rates=(1e-3, 3e-3, 1e-2)), [], []
    nats = {1e-3: 3.0, 3e-3: 2.0, 1e-2: 1.9, 3e-2: 1.8, 1e-1: float("nan")}
    while "graft" not in best_rates(design, rows):
        run = runs_left(design, rows)[0]
        tried.append(run.lr)
        rows.append(
            {
                "kind": "tune",
                "arm": "graft",
                "seed": 99,
                "lr": run.lr,
                "design": design.digest,
                "dev_nats": nats[run.lr],
            }
        )
    assert tried == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1] and best_rates(design, rows) == {"graft": 3e-2}
    assert rates_left(design, {1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}) == [3e-4]
    assert rates_left(design, {1e-3: 2.0, 3e-3: 1.0, 1e-2: 3.0}) == []


def test_rows_of_another_design_do_not_count(setting):
    design = setting[0]
    row = {"kind": "tune", "arm": "graft", "seed": 99, "lr": 1e-3, "design": design.digest, "dev_nats": 1.0}
    assert len(runs_left(design, [row])) == len(runs_left(design, [])) - 1
    for other in (replace(design, tokens=32 * CONTEXT), replace(design, of=("another model",))):
        assert len(runs_left(other, [row])) == len(runs_left(other, []))
        assert "graft" not in best_rates(replace(other, rates=(1e-3,)), [row])
    more = replace(design, seeds=(0, 1, 2))  # more seeds are the same design
    assert len(runs_left(more, [row])) == len(runs_left(more, [])) - 1


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"kind": "tune"})
    path.write_text('{"kind": \n' + path.read_text())
    with pytest.raises(DataError, match="line 1 is no result"):
        read_rows(path)
    with pytest.raises(ConfigError, match='unknown arm "gaft"'):
        Design(arms=("gaft",))


# GGUF


def tiny_gguf(path, seed: int = 0) -> None:
    """A two-block Llama of random float32 weights, in the names and order of a GGUF file."""
    import gguf

    writer, rng = gguf.GGUFWriter(str(path), "llama"), np.random.default_rng(seed)
    width, inner, vocab = 32, 48, 300
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    letters = list(pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list(["<|endoftext|>", *sorted(letters), "AB", *(f"<extra{n}>" for n in range(vocab - 258))])
    writer.add_token_merges(["A B"])
    writer.add_token_types([3] + [1] * (vocab - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (vocab, width), "output_norm": (width,), "output": (vocab, width)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.attn_{name}": (16 if name in "kv" else width, width) for name in ("q", "k", "v", "output")}
        shapes |= {
            f"blk.{i}.ffn_gate": (inner, width),
            f"blk.{i}.ffn_up": (inner, width),
            f"blk.{i}.ffn_down": (width, inner),
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_becomes_a_folder_that_is_the_model_it_was(tmp_path):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "tiny.gguf"
    tiny_gguf(path)
    folder = convert_gguf(path, tmp_path / "model")
    mine = AutoModelForCausalLM.from_pretrained(folder)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids_BT = torch.randint(300, (2, 8))
    assert torch.equal(mine(ids_BT).logits, packed(ids_BT).logits)
    assert not hasattr(mine.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(folder).decode([65 - 33 + 1]) == "A"
    made = (folder / "manifest.json").stat().st_mtime_ns
    assert convert_gguf(path, folder) == folder and (folder / "manifest.json").stat().st_mtime_ns == made  # kept
    assert not [name for name in tmp_path.iterdir() if name.name.endswith(".part")]
    tiny_gguf(path, seed=1)
    with pytest.raises(CheckpointError, match=r"holds another model than tiny\.gguf"):
        convert_gguf(path, folder)


def test_what_is_no_gguf_is_refused_and_leaves_nothing(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "not.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(DataError, match="not a GGUF model"):
        convert_gguf(tmp_path / "not.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(DataError, match="nengram data fetch smollm2"):
        smollm2(tmp_path)
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '[".lock", "not.gguf"]'
