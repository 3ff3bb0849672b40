"""Tokenizers: the same text trains the same ids, digests see what matters, a bad file is one clear line."""

import pytest
from tokenizers import AddedToken, Tokenizer, models

from nengram.errors import DataError
from nengram.text import DOC, PAD, doc_id, load_tokenizer, tokenizer_digest, train_bpe

TEXTS = ["The horse Bucephalus was tamed by Alexander the Great. " * 3, "naïve café 中国 the horses"] * 5


def with_special(*tokens: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


def test_training_twice_gives_the_same_tokenizer():
    first, second = train_bpe(TEXTS, 300), train_bpe(iter(TEXTS), 300)
    assert first.to_str() == second.to_str()


def test_trained_bpe_has_the_size_asked_for_and_its_special_tokens_first():
    tokenizer = train_bpe(TEXTS, 290)
    assert tokenizer.get_vocab_size() == 290
    assert (tokenizer.token_to_id(PAD), tokenizer.token_to_id(DOC)) == (0, 1)


def test_trained_bpe_encodes_any_text_and_gives_it_back():
    tokenizer = train_bpe(TEXTS, 280)
    text = " leading space\n\ttabs, ünseen 🜁 signs\x00 and  runs "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(("size", "says"), [(257, "too small"), (5000, "of the 5000 asked for")])
def test_a_vocabulary_out_of_reach_is_refused(size, says):
    with pytest.raises(DataError, match=says):
        train_bpe(TEXTS, size)


def test_digest_survives_a_round_trip_through_a_file(tmp_path):
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_digest(load_tokenizer(tmp_path / "tokenizer.json")) == tokenizer_digest(tokenizer)


def test_digest_ignores_padding_and_truncation_and_sees_the_vocabulary():
    tokenizer = train_bpe(TEXTS, 300)
    before = tokenizer_digest(tokenizer)
    tokenizer.enable_padding(pad_token=PAD)
    tokenizer.enable_truncation(4)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.add_special_tokens(["<|new|>"])
    assert tokenizer_digest(tokenizer) != before


def test_a_file_that_truncates_and_pads_is_loaded_without_those_settings(tmp_path):
    tokenizer = train_bpe(TEXTS, 300)
    whole = tokenizer.encode(TEXTS[0]).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(TEXTS[0]).ids == whole


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (("<s>", "</s>"), "</s>"),
        (("<|begin_of_text|>", "<|end_of_text|>"), "<|end_of_text|>"),
        (("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), "<｜end▁of▁sentence｜>"),
        (("<|endoftext|>", "<|im_end|>", DOC), DOC),
        (("<bos>", "<user>"), "<bos>"),
    ],
)
def test_the_separator_of_a_foreign_tokenizer_is_found(tokens, expected):
    tokenizer = with_special(*tokens)
    assert doc_id(tokenizer) == tokenizer.token_to_id(expected)


def test_a_separator_named_by_the_caller_wins_and_an_unknown_one_is_refused():
    tokenizer = with_special("</s>", "<|im_end|>")
    assert doc_id(tokenizer, "<|im_end|>") == tokenizer.token_to_id("<|im_end|>")
    with pytest.raises(DataError, match=r'did you mean "<\|im_end\|>"'):
        doc_id(tokenizer, "<|in_end|>")


def test_no_separator_at_all_says_what_to_pass():
    with pytest.raises(DataError, match=r"<\|user\|>.*doc_token"):
        doc_id(with_special("<|user|>"))


def test_bad_tokenizer_files_are_refused_with_their_name_and_reason(tmp_path):
    for name, content, says in [
        ("broken.json", b"{", "not a tokenizer.json"),
        ("other.json", b'{"a": 1}', "not a tokenizer.json"),
        ("latin.json", b"\xff\xfe", "not UTF-8"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: {says}") as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"missing\.json: No such file"):
        load_tokenizer(tmp_path / "missing.json")
    with pytest.raises(DataError, match="directory"):
        load_tokenizer(tmp_path)
