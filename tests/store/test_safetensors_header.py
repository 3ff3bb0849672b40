"""The header parser: it reads what the safetensors library writes, agrees with it on what is one, and survives what is not."""

import json
import os
import random
import re
import tracemalloc

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from nengram.errors import CheckpointError
from nengram.store.safetensors_header import DTYPE_BITS, MAX_HEADER_BYTES, read_header

F32_2x3 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
EDGES = (0, 1, -1, 7, 8, 9, 24, 31, 2**31, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**40)


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with `header` (bytes, text, or anything JSON can hold) and `data`."""
    if not isinstance(header, (bytes, str)):
        header = json.dumps(header)
    text = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def refusal(path, file: bytes) -> str:
    """The line with which `file` is refused."""
    path.write_bytes(file)
    with pytest.raises(CheckpointError) as refused:
        read_header(path)
    line = str(refused.value)
    assert str(path) in line and "\n" not in line and line.isprintable() and len(line) < 400
    assert line.endswith("; make or copy it again")
    return line


def tensors_of(found) -> dict:
    return {name: (entry.dtype, entry.shape) for name, entry in found.tensors.items()}


@given(
    st.dictionaries(st.text(max_size=8), st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=5),
    st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3),
)
def test_reads_what_the_library_writes(tmp_path_factory, shapes, metadata):
    path = tmp_path_factory.getbasetemp() / "written"
    arrays = {name: np.full(shape, place, np.int16) for place, (name, shape) in enumerate(shapes.items())}
    path.write_bytes(save(arrays, metadata))
    found = read_header(path)
    assert found.metadata == metadata
    assert tensors_of(found) == {name: ("I16", array.shape) for name, array in arrays.items()}
    whole = path.read_bytes()
    for name, array in arrays.items():
        entry = found.tensors[name]
        assert whole[entry.begin : entry.end] == array.tobytes()


def test_every_dtype_of_the_library_is_known(tmp_path):
    for dtype, bits in DTYPE_BITS.items():
        file = packed({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}, bytes(bits))
        (tmp_path / "a").write_bytes(file)
        assert read_header(tmp_path / "a").tensors["a"] == (dtype, (8,), len(file) - bits, len(file))
        assert safetensors.deserialize(file)[0][1]["dtype"] == dtype


def test_an_open_descriptor_is_read_and_left_open(tmp_path):
    (tmp_path / "a").write_bytes(packed({"a": F32_2x3}, bytes(24)))
    with open(tmp_path / "a", "rb") as file:
        assert read_header(file.fileno()) == read_header(tmp_path / "a")
        file.seek(0)
        assert len(file.read()) == (tmp_path / "a").stat().st_size


REFUSED = {
    "empty file": (b"", "0 bytes are too few"),
    "no header": (packed(b""), "too few"),
    "length beyond the file": (packed({"a": F32_2x3}, bytes(24), length=10**6), "does not fit"),
    "length beyond reason": (packed(b"{}", length=2**64 - 1), "does not fit"),
    "leading space": (packed(" {}"), "does not begin with {"),
    "list": (packed("[]"), "does not begin with {"),
    "cut JSON": (packed('{"a":{"dtype":"F32"'), "the end at character 19"),
    "something after it": (packed("{} x"), "goes on after its end"),
    "not UTF-8": (packed(b'{"\xff":1}'), "not UTF-8 at byte 10"),
    "half a surrogate": (packed('{"__metadata__":{"a":"\\ud800"}}'), "is not text"),
    "broken escape": (packed('{"\\q":{}}'), "is not text"),
    "control character": (packed('{"a\nb":{}}'), "where a string belongs"),
    "the same key": (packed('{"__metadata__":{"a":"1","a":"2"}}'), '"a" occurs twice'),
    "the same tensor": (packed(f'{{"a":{json.dumps(F32_2x3)},"a":{json.dumps(F32_2x3)}}}', bytes(24)), "occurs twice"),
    "metadata number": (packed({"__metadata__": {"a": 1}}), "where a string belongs"),
    "metadata list": (packed({"__metadata__": ["a"]}), "where { belongs"),
    "tensor that is a list": (packed({"a": [1]}), "where { belongs"),
    "unknown field": (packed({"a": F32_2x3 | {"stride": [1]}}, bytes(24)), 'a field "stride"'),
    "missing field": (packed({"a": {"dtype": "F32", "shape": []}}), "lacks data_offsets"),
    "unknown dtype": (packed({"a": F32_2x3 | {"dtype": "F31"}}, bytes(24)), 'dtype "F31"'),
    "negative size": (packed({"a": F32_2x3 | {"shape": [-2, -3]}}, bytes(24)), "shape of tensor"),
    "float": (packed({"a": F32_2x3 | {"shape": [2.0, 3]}}, bytes(24)), "shape of tensor"),
    "exponent": (packed('{"a":{"dtype":"U8","shape":[1e1],"data_offsets":[0,10]}}', bytes(10)), "shape of tensor"),
    "truth": (packed({"a": F32_2x3 | {"shape": [True]}}, bytes(24)), "shape of tensor"),
    "leading zero": (packed('{"a":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}', b"a"), "shape of tensor"),
    "huge integer": (packed({"a": F32_2x3 | {"data_offsets": [0, 10**40]}}, bytes(24)), "data_offsets of tensor"),
    "33 dimensions": (packed({"a": F32_2x3 | {"shape": [1] * 33}}, bytes(24)), "at most 32"),
    "one offset": (packed({"a": F32_2x3 | {"data_offsets": [0]}}, bytes(24)), "1 data_offsets"),
    "offsets turned round": (packed({"a": F32_2x3 | {"data_offsets": [24, 0]}}, bytes(24)), "cannot be the bytes"),
    "shape and span differ": (packed({"a": F32_2x3 | {"shape": [2, 4]}}, bytes(24)), "cannot be the bytes"),
    "product overflows": (packed({"a": F32_2x3 | {"shape": [2**62, 2**62]}}, bytes(24)), "cannot be the bytes"),
    "bits that fill no byte": (packed({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"a"), "cannot be"),
    "out of the file": (packed({"a": F32_2x3}, bytes(23)), "of a file of"),
    "bytes left over": (packed({"a": F32_2x3}, bytes(25)), "belong to no tensor"),
    "hole": (packed({"a": F32_2x3 | {"data_offsets": [1, 25]}}, bytes(25)), "a gap before"),
    "overlap": (packed({"a": F32_2x3, "b": F32_2x3}, bytes(24)), "shares bytes"),
    "deep nesting": (packed('{"a":' + "[" * 200_000), "where { belongs"),
    "nested objects": (packed('{"a":' * 200_000), "has a field"),
}


@pytest.mark.parametrize("file", [file for file, _ in REFUSED.values()], ids=list(REFUSED))
def test_refused_in_one_line(tmp_path, file):
    expected = next(text for other, text in REFUSED.values() if other is file)
    assert expected in refusal(tmp_path / "bad.safetensors", file)


def test_names_out_of_a_file_cannot_break_the_line(tmp_path):
    name = "a\\u001b[31m\\n" + "x" * 1000
    line = refusal(tmp_path / "a", packed(f'{{"{name}":{{}}}}'))
    assert "\\u001b" in line and "x..." in line


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("", "not a file but a folder"), ("pipe", "not a file"), ("nothing", "no such file")):
        with pytest.raises(CheckpointError, match=reason):
            read_header(tmp_path / name)


def test_every_truncation_is_refused(tmp_path):
    whole = packed({"__metadata__": {"a": "b"}, "a": F32_2x3}, bytes(24))
    (tmp_path / "a").write_bytes(whole)
    read_header(tmp_path / "a")
    for size in range(len(whole)):
        refusal(tmp_path / "a", whole[:size])


BOMBS = {
    "lists": '{"a":' + "[" * 3_000_000,
    "many lists": '{"a":{"shape":[' + "[]," * 1_000_000,
    "digits": '{"a":{"shape":[' + "9" * 3_000_000 + "]}}",
    "dimensions": '{"a":{"shape":[' + "1," * 1_500_000 + "1]}}",
    "spaces": '{"a":{"shape":[1' + " " * 3_000_000 + "x]}}",
    "spaces and commas": '{"a":{"shape":[' + ("1" + " " * 90_000 + ",") * 32 + "x]}}",
    "open string": '{"a' + "x" * 3_000_000,
    "escapes": '{"__metadata__":{"a":"' + "\\n" * 1_500_000 + '"}}',
    "open escapes": '{"__metadata__":{"a":"' + "\\n" * 1_500_000,
    "keys": '{"__metadata__":{' + ",".join(f'"{key:x}":""' for key in range(20_000)) + "}}",
    "tensors": "{"
    + ",".join(f'"{key:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for key in range(4_000))
    + "}",
    "late fault": '{"__metadata__":{"a":"' + "x" * 3_000_000 + '"}} {',
}


@pytest.mark.parametrize("name", BOMBS)
def test_memory_stays_within_a_small_multiple_of_the_header(tmp_path, name):
    """16 bytes for each of the header's: the costliest lawful one, many tiny keys, takes 13 of them."""
    file = packed(BOMBS[name])
    (tmp_path / "a").write_bytes(file)
    assert peak_bytes(tmp_path / "a") < 2**17 + 16 * len(file)


def peak_bytes(path) -> int:
    """What reading a header, that may well be refused, allocates at most."""
    tracemalloc.start()
    try:
        read_header(path)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_a_length_allocates_nothing_that_the_file_does_not_hold(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(packed("{", length=MAX_HEADER_BYTES))
    assert peak_bytes(path) < 2**17
    with open(path, "r+b") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2**40)
    assert peak_bytes(path) < 2**17
    with pytest.raises(CheckpointError, match="beyond the 100,000,000 that are allowed"):
        read_header(path)


class Garbage:
    """Files that are nearly safetensors: mutations of valid ones, and headers of the right words in the wrong places."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        arrays = {"weight": np.arange(12, dtype=np.uint8).reshape(3, 4), "b": np.zeros((2, 2), np.float32)}
        scalar = {"s": np.array(3, np.int64), "empty": np.zeros((0, 4), np.float16)}
        self.valid = [
            save(arrays, {"format": "x", "é\n": '{"q": [1]}'}),
            save(scalar),
            packed({}),
            packed({"__metadata__": {"a": "b"}, "a": F32_2x3}, bytes(24)),
            packed(json.dumps({"a": F32_2x3}, indent=1) + "   ", bytes(24)),
        ]

    def file(self) -> bytes:
        """One input of about 20 to 2,000 bytes."""
        return self.mutated(self.random.choice(self.valid)) if self.random.random() < 0.6 else self.made()

    def mutated(self, file: bytes) -> bytes:
        for _ in range(self.random.choice((1, 1, 1, 2, 3, 8))):
            file = self.random.choice((self.flip, self.cut, self.insert, self.repeat, self.renumber, self.resize))(file)
        return file

    def made(self) -> bytes:
        count = self.random.randrange(4)
        fields = {self.name(): self.entry() for _ in range(count)}
        if self.random.random() < 0.4:
            fields["__metadata__"] = self.random.choice(({"a": "b"}, {"a": self.value(2)}, self.value(2)))
        text = json.dumps(fields, ensure_ascii=self.random.random() < 0.5)
        data = bytes(self.random.choice((0, 1, 8, 24, 48)))
        return packed(text, data, None if self.random.random() < 0.95 else self.random.choice(EDGES) % 2**64)

    def entry(self) -> object:
        size = self.random.choice((1, 4, 8, 24))
        begin = self.random.choice((0, 0, 0, 1, 8, 24, self.edge()))
        entry = {
            "dtype": self.random.choice((*DTYPE_BITS, "U8", "U8", "F32", "", 8)),
            "shape": self.random.choice(([size], [1, size], [], [size, 0], self.value(2), [self.edge(), self.edge()])),
            "data_offsets": self.random.choice(([begin, begin + size], [begin, begin + size], self.value(2))),
        }
        if self.random.random() < 0.1:
            entry.pop(self.random.choice(list(entry)))
        if self.random.random() < 0.05:
            entry[self.name()] = self.value(2)
        return entry if self.random.random() < 0.95 else self.value(3)

    def value(self, depth: int) -> object:
        if depth and self.random.random() < 0.4:
            items = [self.value(depth - 1) for _ in range(self.random.randrange(4))]
            return items if self.random.random() < 0.5 else {self.name(): item for item in items}
        return self.random.choice((self.edge(), 1.5, None, True, self.name(), -0.0, 1e300))

    def edge(self) -> int:
        return self.random.choice(EDGES)

    def name(self) -> str:
        return self.random.choice(("a", "b", "weight", "__metadata__", "", "é", "\u0000", "\ud800", "dtype", "x" * 99))

    def place(self, file: bytes) -> int:
        return self.random.randrange(len(file) + 1)

    def flip(self, file: bytes) -> bytes:
        changed = bytearray(file or b"\0")
        changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def cut(self, file: bytes) -> bytes:
        begin, end = sorted((self.place(file), self.place(file)))
        return file[:begin] + file[end:] if self.random.random() < 0.5 else file[:begin]

    def insert(self, file: bytes) -> bytes:
        place = self.place(file)
        tokens = (*'{}[]:,"\\ \n0-9.eE', "null", '"a":', '{"a":1}', "\ufeff", "[[", '"\\u0000"', "1e999", "NaN")
        added = self.random.choice((self.random.randbytes(3), self.random.choice(tokens).encode()))
        return file[:place] + added + file[place:]

    def repeat(self, file: bytes) -> bytes:
        begin, end = sorted((self.place(file), self.place(file)))
        return file[:end] + file[begin:end] + file[end:]

    def renumber(self, file: bytes) -> bytes:
        numbers = [match.span() for match in re.finditer(rb"[0-9]+", file)]
        if not numbers:
            return file
        begin, end = self.random.choice(numbers)
        return file[:begin] + str(self.edge()).encode() + file[end:]

    def resize(self, file: bytes) -> bytes:
        """The length that the header has now, or an edge."""
        place = file.rfind(b"}") + 1
        length = self.random.choice((max(0, place - 8), self.random.choice(EDGES) % 2**64))
        return length.to_bytes(8, "little") + file[8:]


def fuzz(path, seed: int, count: int) -> tuple[int, int]:
    """Read `count` inputs; how many were accepted, and by the library. Anything but acceptance or CheckpointError escapes."""
    garbage, accepted, theirs = Garbage(seed), 0, 0
    with open(path, "w+b", buffering=0) as file:
        for _ in range(count):
            given = garbage.file()
            os.pwrite(file.fileno(), given, 0)
            os.truncate(file.fileno(), len(given))
            mine, library = found(file.fileno()), library_found(given)
            accepted, theirs = accepted + (mine is not None), theirs + (library is not None)
            if mine is not None:
                assert library == mine, given
            elif library is not None:
                assert is_deliberate(given), given
    return accepted, theirs


def found(descriptor: int) -> dict | None:
    try:
        return tensors_of(read_header(descriptor))
    except CheckpointError as error:
        assert "\n" not in str(error)
        return None


def library_found(file: bytes) -> dict | None:
    try:
        return {name: (one["dtype"], tuple(one["shape"])) for name, one in safetensors.deserialize(file)}
    except safetensors.SafetensorError:
        return None


def is_deliberate(file: bytes) -> bool:
    """Whether a file the library takes has what this parser refuses on purpose: space before {, keys twice, new fields, null."""
    refused = [file[8:9] != b"{"]

    def look(pairs):
        names = [name for name, _ in pairs]
        refused.append(len(names) != len(set(names)))
        known = {"dtype", "shape", "data_offsets"}
        refused.append(bool(known & set(names)) and not known >= set(names))
        refused.append(("__metadata__", None) in pairs)
        return dict(pairs)

    size = int.from_bytes(file[:8], "little")
    json.loads(file[8 : 8 + size], object_pairs_hook=look)
    return any(refused)


def test_agrees_with_the_library_on_generated_inputs(tmp_path):
    accepted, theirs = fuzz(tmp_path / "a", seed=0, count=5_000)
    assert 100 < accepted <= theirs < 5_000


@pytest.mark.slow
def test_agrees_with_the_library_on_very_many_generated_inputs(tmp_path):
    accepted, theirs = fuzz(tmp_path / "a", seed=1, count=220_000)
    assert 5_000 < accepted <= theirs < 220_000


def test_generated_inputs_allocate_no_more_than_they_warrant(tmp_path):
    garbage = Garbage(2)
    for _ in range(500):
        given = garbage.file()
        (tmp_path / "a").write_bytes(given)
        assert peak_bytes(tmp_path / "a") < 2**16 + 16 * len(given)
