"""Rows of bytes: the same bits from every form, zeros that stay zeros, errors within half a step, and clear refusals."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nengram.errors import StoreError
from nengram.store import codecs, codecs_reference
from nengram.store.codecs import CODECS, codec_from_dict, make_codec

WIDTHS = (1, 3, 4, 31, 32, 33, 64, 80, 160, 256)
CODED = [name for name, kind in CODECS.items() if not kind.plain]
LARGEST = 100.0
SMALLEST = 2.0**-149  # of float32


def codec_of(name, width, largest=LARGEST):
    parameters = {"scale": codecs.Fp8Tensor.scale_for(largest)} if name == "fp8_tensor" else {}
    return make_codec(name, width, **parameters)


def awkward_rows(width, seed=0):
    """Zeros, negative zeros, subnormals, one large number among small ones, equal numbers, and ordinary rows."""
    rows_NE = torch.randn(12, width, generator=torch.Generator().manual_seed(seed)).clamp(-8, 8) * 10
    rows_NE[0] = 0.0
    rows_NE[1] = -0.0
    rows_NE[2] = SMALLEST
    rows_NE[3] *= 1e-39
    rows_NE[4] *= 1e-8
    rows_NE[4, -1] = LARGEST
    rows_NE[5] = -LARGEST
    rows_NE[6, ::2] = -0.0
    rows_NE[7] *= torch.logspace(-38, 0, width)
    return rows_NE


def same_numbers(found, expected):
    """Whether two arrays agree to the bit, any NaN being as good as another."""
    found, expected = (np.ascontiguousarray(array, dtype=np.float32) for array in (found, expected))
    same_bits = found.view(np.uint32) == expected.view(np.uint32)
    return bool((same_bits | (np.isnan(found) & np.isnan(expected))).all())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CODECS)
def test_every_form_gives_the_same_bits(name, width):
    codec, rows_NE = codec_of(name, width), awkward_rows(width)
    bytes_NB = codec.encode(rows_NE)
    assert bytes_NB.shape == (len(rows_NE), codec.row_bytes) and bytes_NB.dtype == torch.uint8
    assert np.array_equal(bytes_NB.numpy(), codecs_reference.encode_reference(codec, rows_NE.numpy()))
    any_bytes = torch.randint(0, 256, (40, codec.row_bytes), generator=torch.Generator().manual_seed(1))
    for stored_NB in (bytes_NB, any_bytes.to(torch.uint8)):
        expected_NE = codecs_reference.decode_reference(codec, stored_NB.numpy())
        vectors_NE = codec.decode(stored_NB)
        assert vectors_NE.dtype == codec.vector_dtype
        assert same_numbers(vectors_NE.float(), expected_NE)
        out_NE = torch.full((len(stored_NB), width), math.nan, dtype=codec.vector_dtype)
        assert codec.decode(stored_NB, out_NE) is out_NE and same_numbers(out_NE.float(), expected_NE)
        if not codec.plain:
            assert same_numbers(codec.decode_torch(stored_NB), expected_NE)


@pytest.mark.parametrize("name", CODED)
def test_every_byte_of_every_kind_is_decoded_alike(name):
    """All 256 values under all 256 scales (under 65,536 bfloat16 scales for integers)."""
    codec = codec_of(name, 256)
    values_B = np.arange(256, dtype=np.uint8)
    count = {"fp8": 256, "fp8_tensor": 1}.get(name, 2000)
    scales_N = np.random.default_rng(0).choice(65_536, count, replace=False) if count == 2000 else np.arange(count)
    bytes_NB = np.zeros((count, codec.row_bytes), dtype=np.uint8)
    bytes_NB[:, : min(256, codec.row_bytes - 2)] = values_B[: codec.row_bytes - 2]
    if name == "fp8":
        bytes_NB[:, :256], bytes_NB[:, 256:] = values_B, scales_N[:, None]
    elif name != "fp8_tensor":
        bytes_NB[:, -2:] = scales_N.astype("<u2").view(np.uint8).reshape(-1, 2)
    expected_NE = codecs_reference.decode_reference(codec, bytes_NB)
    assert same_numbers(codec.decode(torch.from_numpy(bytes_NB)), expected_NE)
    assert same_numbers(codec.decode_torch(torch.from_numpy(bytes_NB)), expected_NE)


def test_e4m3_and_ue8m0_are_torchs():
    every = torch.arange(256, dtype=torch.uint8)
    assert same_numbers(every.view(torch.float8_e4m3fn).float(), codecs_reference.E4M3_VALUES)
    assert same_numbers(every.view(torch.float8_e8m0fnu).float(), codecs_reference.UE8M0_VALUES)
    assert math.isnan(codecs_reference.E4M3_VALUES[0x7F]) and math.isnan(codecs_reference.UE8M0_VALUES[255])
    numbers = torch.cat([torch.linspace(-448, 448, 5001), torch.logspace(-12, 2.65, 500), torch.tensor([0.0, -0.0])])
    halfway = torch.tensor(codecs_reference.E4M3_VALUES[:127]).float()
    numbers = torch.cat([numbers, (halfway[1:] + halfway[:-1]) / 2])
    expected = numbers.to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    assert [codecs_reference.e4m3_byte(x) for x in numbers.tolist()] == expected
    assert make_codec("fp8_tensor", len(numbers), scale=1.0).encode(numbers[None])[0].tolist() == expected


@pytest.mark.parametrize("name", CODECS)
def test_zeros_are_zero_bytes_both_ways(name):
    codec = codec_of(name, 33)
    assert not codec.encode(torch.zeros(2, 33)).any()
    vectors_NE = codec.decode(torch.zeros(2, codec.row_bytes, dtype=torch.uint8))
    assert not vectors_NE.any() and not vectors_NE.signbit().any()


@pytest.mark.parametrize("name", CODED)
def test_what_was_decoded_is_encoded_without_loss(name):
    """Numbers that a codec can say, it says again: a table packed twice is the table packed once."""
    codec = codec_of(name, 80)
    once_NE = codec.decode(codec.encode(awkward_rows(80)))
    assert same_numbers(codec.decode(codec.encode(once_NE)), once_NE)


finite = st.floats(-(2.0**126), 2.0**126, width=32)
rows = st.one_of(
    st.lists(finite, min_size=1, max_size=70), st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=70)
)


@settings(max_examples=150, deadline=None)
@given(rows)
def test_an_error_is_at_most_half_a_step(row):
    row_1E = torch.tensor([row])
    magnitudes = row_1E.abs().double()
    largest = float(magnitudes.max())
    for name in ("bf16", "fp8", "int8", "int4"):
        codec = make_codec(name, len(row))
        error_E = (codec.decode(codec.encode(row_1E)).double() - row_1E.double()).abs()[0]
        if name == "bf16":
            half_step_E = magnitudes[0] * 2.0**-8 + 2.0**-134
        elif name == "fp8":
            scales_K = codec.encode(row_1E)[0, len(row) :].double().sub(127).exp2()
            scale_E = scales_K.repeat_interleave(32)[: len(row)]
            assert all(
                block.abs().max() / scale <= 448 for block, scale in zip(magnitudes[0].split(32), scales_K, strict=True)
            )
            half_step_E = torch.maximum(magnitudes[0] / 16, scale_E / 1024)
        else:
            step = float(codec.encode(row_1E)[0, -2:].clone().view(torch.bfloat16))
            assert step * codec.levels >= largest  # rounded up: nothing is clipped
            assert step * codec.levels <= largest * (1 + 2**-7) + codec.levels * 2.0**-133
            half_step_E = torch.full_like(error_E, step * 0.5 * (1 + 2**-20))
        assert (error_E <= half_step_E).all(), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=70))
def test_one_scale_for_a_table_uses_the_whole_range(row):
    largest = max(abs(x) for x in row)
    if 0 < largest < 1e-30:
        return
    codec = codec_of("fp8_tensor", len(row), largest)
    row_1E = torch.tensor([row])
    error_E = (codec.decode(codec.encode(row_1E)) - row_1E).abs()[0].double()
    half_step_E = torch.maximum(row_1E[0].abs().double() / 16, torch.tensor(codec.scale / 1024, dtype=torch.float64))
    assert (error_E <= half_step_E * (1 + 2**-20)).all()
    assert codec.encode(row_1E).max() >= 0


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused_with_their_place(name, number):
    rows_NE = torch.ones(3, 5)
    rows_NE[2, 4] = number
    with pytest.raises(StoreError, match=rf"row 2 holds {number} at place 4: {name} holds finite numbers up to"):
        codec_of(name, 5).encode(rows_NE)


@pytest.mark.parametrize(
    ("name", "fits", "too_large"),
    [
        ("fp32", 3.4028234663852886e38, math.inf),
        ("bf16", 3.396177e38, 3.3961776e38),
        ("fp16", 65_519.0, 65_520.0),
        ("fp8", 2.0**127, 2.1e38),
        ("int8", 2.0**127, 2.1e38),
        ("int4", 2.0**127, 2.1e38),
        ("fp8_tensor", 464.0, 465.0),
    ],
)
def test_the_largest_number_stays_finite_and_the_next_is_refused(name, fits, too_large):
    codec = make_codec(name, 1, **({"scale": 1.0} if name == "fp8_tensor" else {}))
    for sign in (1, -1):
        assert codec.decode(codec.encode(torch.tensor([[sign * fits]]))).isfinite().all()
        with pytest.raises(StoreError, match="row 0 holds"):
            codec.encode(torch.tensor([[sign * too_large]]))


def test_bytes_of_a_row_are_what_is_published():
    sizes = {name: codec_of(name, 256).row_bytes for name in CODECS}
    assert sizes == {"fp32": 1024, "bf16": 512, "fp16": 512, "fp8": 264, "fp8_tensor": 256, "int8": 258, "int4": 130}
    assert [make_codec("fp8", width).row_bytes for width in (1, 32, 33)] == [2, 33, 35]
    assert [make_codec("int4", width).row_bytes for width in (1, 2, 3)] == [3, 3, 4]


def test_known_bytes():
    """Golden: these bytes are in files."""
    fp8 = make_codec("fp8", 33).encode(torch.tensor([[448.0, -1.0, 0.002] + [0.0] * 29 + [3.0]]))[0].tolist()
    assert fp8 == [0x7E, 0xB8, 0x01] + [0] * 29 + [0x7C, 127, 120]
    assert make_codec("int8", 3).encode(torch.tensor([[127.0, -1.0, 64.4]]))[0].tolist() == [127, 255, 64, 0x80, 0x3F]
    assert make_codec("int4", 3).encode(torch.tensor([[7.0, -1.0, 2.0]]))[0].tolist() == [0xF7, 0x02, 0x80, 0x3F]


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_plain_codecs_lend_the_bytes_themselves(name):
    codec = make_codec(name, 4)
    bytes_NB = torch.zeros(2, codec.row_bytes, dtype=torch.uint8)
    vectors_NE = codec.decode(bytes_NB)
    bytes_NB[1] = 60
    assert vectors_NE[1].all() and vectors_NE.dtype == codec.vector_dtype


@pytest.mark.parametrize("name", CODECS)
def test_no_rows_are_no_bytes(name):
    codec = codec_of(name, 7)
    assert codec.encode(torch.empty(0, 7)).shape == (0, codec.row_bytes)
    assert codec.decode(torch.empty(0, codec.row_bytes, dtype=torch.uint8)).shape == (0, 7)


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_survives_json(name):
    codec = codec_of(name, 33)
    again = codec_from_dict(json.loads(json.dumps(codec.to_dict())))
    assert again == codec and hash(again) == hash(codec) and type(again) is type(codec)
    assert again != codec_of(name, 34)


def test_the_scale_of_a_table_is_kept_to_the_bit():
    codec = make_codec("fp8_tensor", 4, scale=0.00019931793212890625)
    assert codec_from_dict(codec.to_dict()).scale == codec.scale == 0.00019931793212890625
    assert codec != make_codec("fp8_tensor", 4, scale=0.0002)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("fp8", "is described by a dict"),
        ({}, "is described by a dict"),
        ({"name": ["fp8"]}, "is described by a dict"),
        ({"name": "fp9", "row_width": 4}, r'unknown codec "fp9" \(did you mean "fp8"\?\)'),
        ({"name": "fp8", "row_bytes": 5}, "numbers, not None"),
        ({"name": "fp8", "row_width": True, "row_bytes": 2}, "numbers, not True"),
        ({"name": "fp8", "row_width": 4.0, "row_bytes": 5}, "numbers, not 4.0"),
        ({"name": "fp8", "row_width": 0, "row_bytes": 0}, "numbers, not 0"),
        ({"name": "fp8", "row_width": 2**60, "row_bytes": 5}, "numbers, not"),
        ({"name": "fp8", "row_width": 4, "row_bytes": 6}, "its description says 6 bytes"),
        ({"name": "fp8", "row_width": 4}, "its description says None bytes"),
        ({"name": "fp8", "row_width": 4, "row_bytes": 5, "scale": "0x1p0"}, 'no parameter "scale"'),
        ({"name": "int8", "row_width": 4, "row_bytes": 6, "block": 3}, 'no parameter "block"'),
        ({"name": "fp8_tensor", "row_width": 4, "row_bytes": 4}, "needs scale="),
        ({"name": "fp8_tensor", "row_width": 4, "row_bytes": 4, "scale": 1.0}, "as float.hex writes it"),
        ({"name": "fp8_tensor", "row_width": 4, "row_bytes": 4, "scale": "zz"}, "as float.hex writes it"),
        ({"name": "fp8_tensor", "row_width": 4, "row_bytes": 4, "scale": "0x1p99999"}, "as float.hex writes it"),
        ({"name": "fp8_tensor", "row_width": 4, "row_bytes": 4, "scale": "nan"}, "above 0"),
        ({"name": "fp8_tensor", "row_width": 4, "row_bytes": 4, "scale": "-0x1p0"}, "above 0"),
        ({"name": "fp8_tensor", "row_width": 4, "row_bytes": 4, "scale": "0x1p-200"}, "above 0"),
        ({"name": "fp8_tensor", "row_width": 4, "row_bytes": 4, "scale": "0x1p127"}, "above 0"),
    ],
)
def test_a_description_that_is_none_is_refused(described, message):
    with pytest.raises(StoreError, match=message) as refused:
        codec_from_dict(described)
    assert "\n" not in str(refused.value)


def test_wrong_shapes_are_refused():
    codec = make_codec("int8", 4)
    with pytest.raises(StoreError, match=r"int8 rows of 4 numbers are needed, not \(2, 5\)"):
        codec.encode(torch.zeros(2, 5))
    for wrong in (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, 6, dtype=torch.int8), torch.zeros(6)):
        with pytest.raises(StoreError, match="int8 rows of 6 uint8 are needed"):
            codec.decode(wrong)
    stored_NB = torch.zeros(2, 6, dtype=torch.uint8)
    for out_NE in (torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(4, 2).T):
        with pytest.raises(StoreError, match="int8 decodes into a contiguous"):
            codec.decode(stored_NB, out_NE)


@pytest.mark.parametrize("name", CODECS)
def test_rows_that_lie_anywhere_in_a_larger_array_decode_alike(name):
    codec = codec_of(name, 32)
    wide = torch.randint(0, 60, (6, codec.row_bytes + 7), dtype=torch.uint8)
    for stored_NB in (wide[::2, 3:-4], wide[1:2, 5:-2], wide[:1, 1:-6]):
        expected_NE = codecs_reference.decode_reference(codec, stored_NB.numpy())
        assert same_numbers(codec.decode(stored_NB).float(), expected_NE)
        if not codec.plain:
            assert same_numbers(codec.decode_torch(stored_NB), expected_NE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CODECS)
def test_a_device_gives_the_same_bits(name):
    codec = codec_of(name, 80)
    bytes_NB = codec.encode(awkward_rows(80))
    assert same_numbers(codec.decode(bytes_NB.cuda()).float().cpu(), codec.decode(bytes_NB).float())
