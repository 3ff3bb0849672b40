"""Streaming text: whole characters only, and the pieces add up to the whole, whatever the tokenizer cuts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from nengram.infer import TextPieces, encode
from nengram.text import train_bpe

TEXT = "naïve café — 中国古代的四大发明 🙂🙃 কলম \u0301 end"
BYTES = train_bpe([TEXT], 258)  # no merges: every byte is a token, so every longer character is cut


def streamed(tokenizer: Tokenizer, ids: list[int], before=()) -> list[str]:
    pieces = TextPieces(tokenizer, before)
    return [*(pieces.add(token) for token in ids), pieces.rest()]


def test_pieces_are_whole_characters_and_add_up():
    ids = encode(BYTES, TEXT)
    assert len(ids) == len(TEXT.encode())
    pieces = streamed(BYTES, ids)
    assert "".join(pieces) == TEXT and pieces[-1] == ""
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_text_goes_on_from_a_prompt_that_it_does_not_repeat():
    ids = encode(BYTES, TEXT)
    assert "".join(streamed(BYTES, ids[7:], before=ids[:7])) == TEXT.encode()[7:].decode()


def test_an_incomplete_character_waits_and_is_shown_as_such_at_the_end():
    ids = encode(BYTES, "a🙂")
    assert streamed(BYTES, ids[:-1]) == ["a", "", "", "", "\ufffd"]


def test_broken_bytes_do_not_stop_the_stream():
    broken = encode(BYTES, "🙂")[:2] + encode(BYTES, "b中")
    pieces = streamed(BYTES, broken)
    assert "".join(pieces) == BYTES.decode(broken) == "\ufffdb中"
    assert pieces[2] == "\ufffdb"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 257), max_size=24), st.integers(0, 24))
def test_any_tokens_stream_to_what_they_decode_to(ids, cut):
    before = encode(BYTES, "aé")
    whole = BYTES.decode([*before, *ids], skip_special_tokens=False)
    assert "aé" + "".join(streamed(BYTES, ids, before)) == whole


@pytest.mark.parametrize(
    ("decoder", "vocabulary", "text"),
    [
        (decoders.Metaspace(), ["▁one", "▁two", "th", "ree"], "one two three"),
        (decoders.WordPiece(), ["one", "two", "th", "##ree"], "one two three"),
    ],
    ids=["metaspace", "wordpiece"],
)
def test_decoders_that_look_at_the_token_before_keep_their_spaces(decoder, vocabulary, text):
    tokens = [*vocabulary[:2], "▁th" if vocabulary[0] == "▁one" else "th", vocabulary[3]]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="th"))
    tokenizer.decoder = decoder
    assert "".join(streamed(tokenizer, [0, 1, 2, 3])) == text
    assert "".join(streamed(tokenizer, [1, 2, 3], before=[0])) == text.removeprefix("one")
