"""Each source's own format into readable entries: the members of one package in, (key, text) pairs out.

A renderer is a pure function of bytes, so it is tested on a few hand-made lines and never needs the network.
The key is what an entry is ABOUT (a headword, a title, a country and a field, a module), because train, dev
and test are divided by its hash: two texts about one thing share a key, are merged into one entry, and fall
on the same side. Digits, dates and names are kept as they are; markup goes.

Members arrive as `{path inside the package: bytes}`, decompressed; pairs leave in the order of the members.
"""

import html
import io
import json
import re
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from xml.etree import ElementTree

Members = Mapping[str, bytes]
Entries = Iterator[tuple[str, str]]


def merged(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Entries by key, sorted; texts that share a key become lines of one entry, repeated lines once."""
    lines: dict[str, dict[str, None]] = defaultdict(dict)
    for key, text in pairs:
        if key.strip() and text.strip():
            lines[key].setdefault(text)
    return {key: "\n".join(lines[key]) for key in sorted(lines)}


def plain(markup: str) -> str:
    """HTML to text: breaks and paragraphs become line ends, other tags vanish, entities are read, white space
    is made single.
    """
    markup = re.sub(r"<\s*(?:br|/p|/li|/div)\b[^>]*>", "\n", markup, flags=re.I)
    text = html.unescape(html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", markup)))
    text = re.sub(r"[\u200b\ufeff\u00ad]", "", _mended(text))
    lines = (re.sub(r"[^\S\n]+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def _mended(text: str) -> str:
    """UTF-8 that was once read as Latin-1 (`GrÃ¸nland`), read again."""
    return re.sub(r"[\u00c2\u00c3][\u0080-\u00bf]", lambda pair: pair[0].encode("latin-1").decode(), text)


# CIA World Factbook: one JSON file per country, {section: {field: {"text": ..} | {subfield: {"text": ..}}}}

COUNTRY_NAMES = {  # where the file's own short name is missing, cut off or a list of islands
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "sv": "Svalbard",
    "um": "United States Pacific Island Wildlife Refuges",
    "xx": "World",
}
NOT_ENGLISH = "major-language sample(s)"


def factbook(members: Members, *, longer_than: int = 0, without: Sequence[str] = ()) -> Entries:
    """Values as "Country. Field: value", keyed "Country: Field"; only values of over `longer_than`
    characters, subfield label included, and no field named in `without`. Over 200 characters are sentences,
    but for a few fields that are long lists.
    """
    for path, data in members.items():
        sections = json.loads(data)
        country = _country(PurePosixPath(path).stem, sections)
        for fields in sections.values():
            for field, content in fields.items():
                field = field.strip()
                values = (value.removeprefix(f"{field}: ") for value in _values(content))
                values = [value for value in values if len(value) > longer_than]
                if values and field not in without:
                    yield f"{country}: {field}", f"{country}. {field}: " + "\n".join(values)


def _country(code: str, sections: dict) -> str:
    names = sections.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = plain(names.get(form, {}).get("text", "none"))
        if code not in COUNTRY_NAMES and name != "none":
            return name
    return COUNTRY_NAMES.get(code, code)


def _values(content: dict, label: str = "") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, dict):
            if name != NOT_ENGLISH:
                yield from _values(value, name.strip())
        elif text := plain(value):
            label_here = label if name == "text" else "note"
            repeated = text.lower().startswith(label_here.rpartition(": ")[2].lower())
            yield text if repeated else f"{label_here}: {text}"


# WordNet: data.<part of speech>, one synset a line; fields of wndb(5), words counted in hexadecimal


def wordnet(members: Members, *, instances_only: bool = False) -> Entries:
    """Synsets as "lemma, lemma: gloss.", keyed by the first lemma. An instance is a named entity (pointer
    `@i`).
    """
    for data in members.values():
        for line in data.decode("ascii").splitlines():
            if not line.startswith(" ") and "|" in line and (not instances_only or " @i " in line):
                yield _synset(line)


def _synset(line: str) -> tuple[str, str]:
    fields, _, gloss = line.partition("|")
    fields = fields.split()
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    lemmas = [re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ") for word in words]
    gloss = re.sub(r"\s+", " ", gloss).replace("`", "'").strip().rstrip(";").strip()
    return lemmas[0], f"{', '.join(lemmas)}: {gloss}" + ("" if gloss[-1:] in {".", "!", "?"} else ".")


# FOLDOC in dictd's form: the text, and an index of (headword, offset, length) with numbers in base 64

BASE_64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def foldoc(members: Members) -> Entries:
    """Entries as "Headword, alias: text", keyed by the first headword; cross-reference braces and the date of
    the entry go.
    """
    index = next(data for path, data in members.items() if path.endswith(".index")).decode()
    text = next(data for path, data in members.items() if not path.endswith(".index"))
    rows = (line.split("\t") for line in index.splitlines())
    spans = {(_number(start), _number(length)) for name, start, length in rows if not name.startswith("00-database")}
    for start, length in sorted(spans):
        head, _, body = text[start : start + length].decode().partition("\n\n")
        names = [name for line in head.splitlines() for name in re.sub(r"\s+", " ", line).strip().split("%%%")]
        paragraphs = [shown for block in re.split(r"\n\s*\n", body) if (shown := _foldoc_paragraph(block))]
        if names and paragraphs:
            yield names[0], f"{', '.join(names)}: " + "\n".join(paragraphs)


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + BASE_64.index(digit)
    return value


def _foldoc_paragraph(block: str) -> str:
    """Prose (every line indented by three) is unwrapped and unmarked; anything indented deeper is a listing
    and is kept.
    """
    lines = [line.rstrip() for line in block.strip("\n").splitlines()]
    if not all(re.match(r" {3}\S", line) for line in lines):
        return "\n".join(line.removeprefix("   ") for line in lines)
    prose = re.sub(r"\s+", " ", " ".join(lines)).strip()
    prose = re.sub(r"\{(.*?)\s*(?:\([a-z]+://[^{}]*\)|\([^{}\s]*\.html?\))?\}", r"\1", prose)
    prose = re.sub(r"^<[^<>]+> ", "", prose)
    return "" if re.fullmatch(r"\(\d{4}-\d\d-\d\d\)|\W*", prose) else prose


# Wikipedia: a MediaWiki XML export

BACK_MATTER = "See also|References|External links|Further reading|(Foot)?notes|Bibliography|Sources|Citations"
DISAMBIGUATION = r"\{\{[^{}|]*(?:disambig|hndis)"
NOT_TEXT = "math|gallery|source|syntaxhighlight|timeline|score|imagemap|chem|code|pre"
NOT_PROSE = ("file:", "image:", "category:", "media:")


def wikipedia(members: Members) -> Entries:
    """Articles as plain paragraphs, keyed by title. Redirects, disambiguations, tables, templates and back
    matter are left out.
    """
    for data in members.values():
        for _, page in ElementTree.iterparse(io.BytesIO(data)):
            if page.tag.endswith("}page"):
                title, space, markup = (page.findtext(f".//{{*}}{tag}") or "" for tag in ("title", "ns", "text"))
                is_list_of_pages = title.endswith("(disambiguation)") or re.search(DISAMBIGUATION, markup, re.I)
                if space == "0" and page.find("{*}redirect") is None and not is_list_of_pages:
                    yield title, wiki_text(markup)
                page.clear()


def wiki_text(markup: str) -> str:
    """Wiki markup to text, from the inside out, since templates, tables and links nest."""
    text = re.sub(r"<!--.*?-->|<ref\b[^<>]*/>", "", markup, flags=re.S)
    text = re.sub(rf"<(ref|{NOT_TEXT})\b[^<>]*>.*?</\1\s*>", "", text, flags=re.S | re.I)
    text = _until_stable(r"\{\{([^{}]*)\}\}", _template, text)
    text = _until_stable(r"\{\|(?:(?!\{\||\|\}).)*\|\}", lambda _: "", text)
    text = re.sub(rf"^=+ *(?:{BACK_MATTER}) *=+ *$.*", "", text, flags=re.S | re.M | re.I)
    text = re.sub(r"\[(?:https?:)?//[^\s\]]+ ?([^\]]*)\]", r"\1", text)
    text = _until_stable(r"\[\[([^\[\]]*)\]\]", _link, text)
    text = re.sub(r"'{2,}|__[A-Z]+__|^[*#:;]+ *|^=+ *| *=+ *$", "", text, flags=re.M)
    text = re.sub(r" ?\([\s,;:]*\)", "", plain(text))
    return re.sub(r" +([,.;])", r"\1", re.sub(r"\(\s*[,;]\s*", "(", text))


def _until_stable(pattern: str, replacement: Callable[[re.Match], str], text: str) -> str:
    count = 1
    while count:
        text, count = re.subn(pattern, replacement, text, flags=re.S)
    return text


def _template(match: re.Match) -> str:
    name, *values = (part.strip() for part in match[1].split("|"))
    values = [value for value in values if "=" not in value]
    if name.lower() in {"convert", "cvt"} and len(values) > 1:
        return f"{values[0]} {values[1]}"
    return values[-1] if name.lower() in {"lang", "nowrap", "transl"} and values else ""


def _link(match: re.Match) -> str:
    return "" if match[1].strip().lower().startswith(NOT_PROSE) else match[1].rpartition("|")[2]


# Python's own standard library


def python_modules(members: Members) -> Entries:
    """Modules as written, but for line ends, keyed by their dotted name."""
    for path, data in members.items():
        name = ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        yield name, "\n".join(data.decode(encoding).splitlines())


RENDERERS: dict[str, Callable[..., Entries]] = {
    render.__name__: render for render in (factbook, wordnet, foldoc, wikipedia, python_modules)
}
