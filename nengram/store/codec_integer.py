"""Rows of small integers with one bfloat16 scale each, rounded up so that nothing is clipped."""

from typing import Any, ClassVar

import torch

from nengram.store.codec import CodedRow, moved


class IntegerCodec(CodedRow):
    """Integers of -`levels`..`levels` and one bfloat16 scale a row, the smallest that keeps the row within them."""

    levels: ClassVar[int]

    def _integers(self, vectors_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers int8 `[N, E]`, and the scale's two bytes `[N, 2]`."""
        largest_N = vectors_NE.abs().amax(-1)
        bits_N = (largest_N.double() / self.levels).float().view(torch.int32) >> 16
        too_small_N = _bf16_of_bits(bits_N).double() * self.levels < largest_N
        bits_N += too_small_N
        scales_N1 = _bf16_of_bits(bits_N).unsqueeze(-1)
        integers_NE = (vectors_NE / scales_N1).nan_to_num_(nan=0.0).round_().to(torch.int8)
        return integers_NE, bits_N.to(torch.int16).view(torch.uint8).view(-1, 2)

    def _scales(self, bytes_NB: torch.Tensor) -> torch.Tensor:
        return moved(bytes_NB[:, -2:]).view(torch.bfloat16).float()


class Int8(IntegerCodec):
    """A byte a number: an error of at most 1/252 of the row's largest number."""

    name, levels = "int8", 127

    def _bytes_of_a_row(self) -> int:
        return self.row_width + 2

    def _encode(self, vectors_NE: torch.Tensor) -> torch.Tensor:
        integers_NE, scales_N2 = self._integers(vectors_NE)
        return torch.cat([integers_NE.view(torch.uint8), scales_N2], dim=1)

    def decode_torch(self, bytes_NB: torch.Tensor) -> torch.Tensor:
        return bytes_NB[:, : self.row_width].view(torch.int8).float() * self._scales(bytes_NB)

    def _decode_compiled(self, bytes_NB: Any, out_NE: Any) -> None:
        from nengram.store import decode

        decode.int8(bytes_NB, out_NE)


class Int4(IntegerCodec):
    """Half a byte a number: an error of at most 1/13.8 of the row's largest number."""

    name, levels = "int4", 7

    def _bytes_of_a_row(self) -> int:
        return -(-self.row_width // 2) + 2

    def _encode(self, vectors_NE: torch.Tensor) -> torch.Tensor:
        integers_NE, scales_N2 = self._integers(vectors_NE)
        nibbles_NE = torch.nn.functional.pad(integers_NE, (0, self.row_width % 2)).view(torch.uint8) & 15
        return torch.cat([nibbles_NE[:, ::2] | nibbles_NE[:, 1::2] << 4, scales_N2], dim=1)

    def decode_torch(self, bytes_NB: torch.Tensor) -> torch.Tensor:
        pairs_NP = bytes_NB[:, :-2].view(torch.int8)
        nibbles_NE = torch.stack([pairs_NP << 4 >> 4, pairs_NP >> 4], dim=-1).flatten(1)[:, : self.row_width]
        return nibbles_NE.float() * self._scales(bytes_NB)

    def _decode_compiled(self, bytes_NB: Any, out_NE: Any) -> None:
        from nengram.store import decode

        decode.int4(bytes_NB, out_NE)


def _bf16_of_bits(bits_N: torch.Tensor) -> torch.Tensor:
    """float32 of a bfloat16 given by its 16 bits as an integer."""
    return (bits_N << 16).view(torch.float32)
