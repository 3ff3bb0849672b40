"""How one row's numbers become bytes, for tables that are larger than one would like.

A row is read alone and from anywhere, so everything that its numbers need lies in it: scales stand at the row's end,
and one row is one read. The kinds:

| name | bytes of a row of E numbers | what they are |
|---|---|---|
| fp32, bf16, fp16 | 4E, 2E, 2E | the numbers themselves; decoding is a view |
| fp8 | E + ceil(E / 32) | e4m3 values, then one ue8m0 scale (a power of two) for every 32 of them |
| fp8_tensor | E | e4m3 values; one float scale for the whole table |
| int8 | E + 2 | integers of -127..127, then one bfloat16 scale |
| int4 | ceil(E / 2) + 2 | integers of -7..7, two a byte, the low nibble first; then one bfloat16 scale |

Three rules hold for all of them. Zero bytes decode to zeros, and zeros encode to zero bytes: a table that was never
written is a sparse file. Scales are rounded up, so nothing is clipped and an error is at most half a step. Infinite
numbers and NaN are refused when a table is written, not met when it is read.

Encoding is torch operations. Decoding on the CPU is compiled (`decode.py`), on other devices it is torch operations;
`codecs_reference.py` says the same in loops. All forms give the same bits.
"""

from typing import Any

from nengram.errors import StoreError, nearest
from nengram.store.codec import Bf16, Codec, Fp16, Fp32
from nengram.store.codec_fp8 import Fp8, Fp8Tensor
from nengram.store.codec_integer import Int4, Int8

__all__ = ["CODECS", "Codec", "Fp8Tensor", "codec_from_dict", "make_codec"]

CODECS: dict[str, type[Codec]] = {kind.name: kind for kind in (Fp32, Bf16, Fp16, Fp8, Fp8Tensor, Int8, Int4)}
PARAMETERS: dict[str, tuple[str, ...]] = {"fp8_tensor": ("scale",)}  # beside row_width


def make_codec(name: str, row_width: int, **parameters: Any) -> Codec:
    """The codec called `name` for rows of `row_width` numbers, e.g. `make_codec("fp8_tensor", 160, scale=2e-4)`.

    Raises: StoreError for an unknown name (the nearest is named), a parameter that is missing, unknown or out of range.
    """
    if name not in CODECS:
        raise StoreError(f'unknown codec "{name}"{nearest(str(name), CODECS)}; there are {", ".join(CODECS)}')
    wanted = PARAMETERS.get(name, ())
    for parameter in parameters:
        if parameter not in wanted:
            raise StoreError(f'{name} has no parameter "{parameter}"{nearest(str(parameter), wanted)}')
    if missing := [parameter for parameter in wanted if parameter not in parameters]:
        raise StoreError(f"{name} needs {missing[0]}=")
    return CODECS[name](row_width, **parameters)


def codec_from_dict(d: dict[str, Any]) -> Codec:
    """The codec that `to_dict` described; `d` may come from anywhere.

    Raises: StoreError for whatever is not exactly such a description.
    """
    if not isinstance(d, dict) or not isinstance(d.get("name"), str):
        raise StoreError("a codec is described by a dict with its name in it")
    parameters = {key: value for key, value in d.items() if key not in ("name", "row_width", "row_bytes")}
    if "scale" in parameters:
        parameters["scale"] = _float_of_hex(parameters["scale"])
    codec = make_codec(d["name"], d.get("row_width"), **parameters)
    if codec.row_bytes != d.get("row_bytes"):
        raise StoreError(f"{codec}: its description says {d.get('row_bytes')!r} bytes")
    return codec


def _float_of_hex(text: object) -> float:
    try:
        return float.fromhex(text)
    except (TypeError, ValueError, OverflowError):
        raise StoreError(f"a codec's scale is written as float.hex writes it, not {text!r}") from None
