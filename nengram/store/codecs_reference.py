"""Codecs as one would write them down: a row at a time, a number at a time, in plain Python. The twin of `codecs.py`.

Python's floats are doubles. In them a product of two of the small numbers here is exact, and rounding it once to
float32 is what a float32 multiplication does; where a codec divides, both divide in float32.
"""

import math
import struct

import numpy as np

BLOCK = 32


def e4m3_value(byte: int) -> float:
    """Sign, four bits of exponent (bias 7), three of mantissa; no infinities, 0x7f and 0xff are NaN."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def ue8m0_value(byte: int) -> float:
    """A power of two: 2^-127 .. 2^127; 0xff is NaN."""
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


E4M3_VALUES = [e4m3_value(byte) for byte in range(256)]
UE8M0_VALUES = [ue8m0_value(byte) for byte in range(256)]


def bf16_value(low: int, high: int) -> float:
    """bfloat16: the upper half of a float32."""
    return struct.unpack("<f", bytes([0, 0, low, high]))[0]


def decode_row(codec, row: bytes) -> list[float]:
    """The numbers of one row, before they are rounded to `codec.vector_dtype`."""
    width = codec.row_width
    match codec.name:
        case "fp32":
            return list(struct.unpack(f"<{width}f", row))
        case "fp16":
            return list(struct.unpack(f"<{width}e", row))
        case "bf16":
            return [bf16_value(*row[2 * e : 2 * e + 2]) for e in range(width)]
        case "fp8":
            return [E4M3_VALUES[row[e]] * UE8M0_VALUES[row[width + e // BLOCK]] for e in range(width)]
        case "fp8_tensor":
            return [E4M3_VALUES[row[e]] * codec.scale for e in range(width)]
        case "int8":
            return [_signed(row[e], 8) * bf16_value(*row[-2:]) for e in range(width)]
        case "int4":
            return [_signed(row[e // 2] >> 4 * (e % 2) & 15, 4) * bf16_value(*row[-2:]) for e in range(width)]
    raise ValueError(f"no reference for {codec.name}")


def decode_reference(codec, bytes_NB: np.ndarray) -> np.ndarray:
    """float32 [N, E] of uint8 [N, B]: the slow twin of `codec.decode(...).float()`."""
    rows = [decode_row(codec, bytes(row_B)) for row_B in bytes_NB]
    with np.errstate(over="ignore"):
        return np.array(rows, dtype=np.float64).reshape(len(rows), codec.row_width).astype(np.float32)


def encode_reference(codec, vectors_NE: np.ndarray) -> np.ndarray:
    """uint8 [N, B] of float32 [N, E], every number within what the codec holds: the slow twin of `codec.encode`."""
    rows = [encode_row(codec, [float(x) for x in row_E]) for row_E in np.asarray(vectors_NE, dtype=np.float32)]
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), codec.row_bytes)


def encode_row(codec, row: list[float]) -> bytes:
    """The bytes of one row of float32 numbers."""
    match codec.name:
        case "fp32":
            return struct.pack(f"<{len(row)}f", *row)
        case "fp16":
            return struct.pack(f"<{len(row)}e", *row)
        case "bf16":
            return b"".join(_bf16_nearest(x) for x in row)
        case "fp8":
            blocks = [row[begin : begin + BLOCK] for begin in range(0, len(row), BLOCK)]
            scales = [smallest_power(max(abs(x) for x in block)) for block in blocks]
            values = [e4m3_byte(x / 2.0 ** (scales[e // BLOCK] - 127)) for e, x in enumerate(row)]
            return bytes(values + scales)
        case "fp8_tensor":
            return bytes(e4m3_byte(_divided(x, codec.scale)) for x in row)
        case "int8" | "int4":
            scale, scale_bytes = smallest_bf16(max(abs(x) for x in row), codec.levels)
            integers = [round(_divided(x, scale)) if scale else 0 for x in row]
            if codec.name == "int8":
                return bytes(integer & 255 for integer in integers) + scale_bytes
            integers += [0] * (len(row) % 2)
            pairs = zip(integers[::2], integers[1::2], strict=True)
            return bytes(low & 15 | (high & 15) << 4 for low, high in pairs) + scale_bytes
    raise ValueError(f"no reference for {codec.name}")


def e4m3_byte(x: float) -> int:
    """The nearest e4m3 value, of two equally near the even one; at most 448."""
    magnitudes = range(127)  # bytes 0x00..0x7e ascend with their values
    byte = min(magnitudes, key=lambda byte: (abs(E4M3_VALUES[byte] - abs(x)), byte & 1))
    return byte | (0x80 if math.copysign(1, x) < 0 else 0)


def smallest_power(largest: float) -> int:
    """The ue8m0 byte of the smallest power of two that brings `largest` within 448; 0 for zero."""
    return next(byte for byte in range(255) if largest <= 448 * UE8M0_VALUES[byte])


def smallest_bf16(largest: float, levels: int) -> tuple[float, bytes]:
    """The smallest bfloat16, and its bytes, of which `levels` reach `largest`."""
    low, high = 0, 0x7F7F  # bit patterns of positive bfloat16 ascend with their values
    while low < high:
        middle = (low + high) // 2
        if bf16_value(middle & 255, middle >> 8) * levels >= largest:
            high = middle
        else:
            low = middle + 1
    return bf16_value(low & 255, low >> 8), low.to_bytes(2, "little")


def _bf16_nearest(x: float) -> bytes:
    bits = int.from_bytes(struct.pack("<f", x), "little")
    bits += 0x7FFF + (bits >> 16 & 1)
    return (bits >> 16).to_bytes(2, "little")


def _divided(x: float, scale: float) -> float:
    """x / scale in float32."""
    return float(np.float32(x) / np.float32(scale))


def _signed(integer: int, bits: int) -> int:
    return integer - (1 << bits) if integer >> (bits - 1) else integer
