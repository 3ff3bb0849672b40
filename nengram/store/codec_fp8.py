"""Rows of e4m3 values: with a power of two for every 32 of them in the row, or under one scale for the whole table."""

import math
from functools import lru_cache
from typing import Any

import torch

from nengram.errors import StoreError
from nengram.store.codec import CodedRow

BLOCK = 32  # values that share a scale
E4M3_MAX = 448.0


class Fp8(CodedRow):
    """e4m3 values in blocks of 32, each block with a power of two of its own: DeepSeek-V4.1's numbers, interleaved.

    The scale is the smallest that keeps the block within 448, so an error is at most 1/16 of the value, or 1/1024 of the
    scale where that is more.
    """

    name = "fp8"

    def _bytes_of_a_row(self) -> int:
        return self.row_width + -(-self.row_width // BLOCK)

    def _encode(self, vectors_NE: torch.Tensor) -> torch.Tensor:
        count, blocks = len(vectors_NE), self.row_bytes - self.row_width
        padded_NKB = torch.zeros(count, blocks * BLOCK)
        padded_NKB[:, : self.row_width] = vectors_NE
        padded_NKB = padded_NKB.view(count, blocks, BLOCK)
        largest_NK = padded_NKB.abs().amax(-1)
        fraction_NK, exponent_NK = torch.frexp(largest_NK)  # 448 = 0.875 x 2^9
        scales_NK = (exponent_NK - 9 + (fraction_NK > 0.875) + 127).clamp_(min=0)
        scales_NK.masked_fill_(largest_NK == 0, 0)
        scaled_NKB = padded_NKB.mul_(_powers_of_two(padded_NKB.device)[254 - scales_NK].unsqueeze(-1))
        bytes_NB = torch.empty(count, self.row_bytes, dtype=torch.uint8)
        values_NE = scaled_NKB.view(count, blocks * BLOCK)[:, : self.row_width].to(torch.float8_e4m3fn)
        bytes_NB[:, : self.row_width] = values_NE.view(torch.uint8)
        bytes_NB[:, self.row_width :] = scales_NK
        return bytes_NB

    def decode_torch(self, bytes_NB: torch.Tensor) -> torch.Tensor:
        values_NE = bytes_NB[:, : self.row_width].contiguous().view(torch.float8_e4m3fn).float()
        scales_NK = _powers_of_two(bytes_NB.device)[bytes_NB[:, self.row_width :].int()]
        return values_NE * scales_NK.repeat_interleave(BLOCK, dim=1)[:, : self.row_width]

    def _decode_compiled(self, bytes_NB: Any, out_NE: Any) -> None:
        from nengram.store import decode  # compiles at first use

        decode.fp8(bytes_NB, out_NE)


class Fp8Tensor(CodedRow):
    """e4m3 values under one scale for the whole table, as the Qwen layout stores them.

    scale: above zero; kept as float32, written as `float.hex`. `scale_for` finds the one that a table needs.
    """

    name, tensor_dtype = "fp8_tensor", "F8_E4M3"

    def __init__(self, row_width: int, scale: float) -> None:
        super().__init__(row_width)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise StoreError(f"the scale of fp8_tensor is a number, not {scale!r}")
        single = float(torch.tensor(float(scale), dtype=torch.float32))
        if not 0 < single * E4M3_MAX <= torch.finfo(torch.float32).max:
            raise StoreError(f"the scale of fp8_tensor must be above 0 and 448 x scale a float32, not {scale!r}")
        self.scale = single

    @staticmethod
    def scale_for(largest: float) -> float:
        """The scale that uses all of e4m3's range when `largest` is the table's largest magnitude; 1 for zeros.

        Raises: StoreError when that is no scale: `largest` is infinite, NaN, or too small.
        """
        return Fp8Tensor(1, largest / E4M3_MAX).scale if largest else 1.0

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"scale": self.scale.hex()}

    def _bytes_of_a_row(self) -> int:
        return self.row_width

    def _largest(self) -> float:
        return 464 * self.scale  # half-way to what would follow 448

    def _encode(self, vectors_NE: torch.Tensor) -> torch.Tensor:
        scaled_NE = (vectors_NE / self.scale).clamp_(-E4M3_MAX, E4M3_MAX)
        return scaled_NE.to(torch.float8_e4m3fn).view(torch.uint8)

    def decode_torch(self, bytes_NB: torch.Tensor) -> torch.Tensor:
        return bytes_NB.contiguous().view(torch.float8_e4m3fn).float() * self.scale

    def _decode_compiled(self, bytes_NB: Any, out_NE: Any) -> None:
        from nengram.store import decode

        decode.fp8_tensor(bytes_NB, self.scale, out_NE)


@lru_cache
def _powers_of_two(device: torch.device) -> torch.Tensor:
    """What the 256 bytes of ue8m0 mean: 2^-127 .. 2^127, and NaN."""
    return torch.tensor([*(2.0**exponent for exponent in range(-127, 128)), math.nan], device=device)
