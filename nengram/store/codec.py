"""What a codec is: one object that describes a row completely, and the checks that all of them share.

The kinds, and the rules that hold for each of them, stand in `codecs.py`.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from nengram.errors import StoreError

WIDEST_ROW = 2**20  # numbers; a description that asks for more is not believed
CODED_MAX = 2.0**127  # so near the end of float32 that half a step more would leave it


class Codec(ABC):
    """One object is a complete description of a row: `row_width` numbers in `row_bytes` bytes.

    vector_dtype: of the vectors that are lent. plain: the bytes are those numbers, and decoding is a view.
    tensor_dtype: how safetensors calls the matrix that is stored; "U8" is `[rows, row_bytes]`.
    """

    name: ClassVar[str]
    plain: ClassVar[bool] = False
    vector_dtype: ClassVar[torch.dtype] = torch.float32
    tensor_dtype: ClassVar[str] = "U8"

    def __init__(self, row_width: int) -> None:
        if isinstance(row_width, bool) or not isinstance(row_width, int) or not 1 <= row_width <= WIDEST_ROW:
            raise StoreError(f"a row has 1 to {WIDEST_ROW:,} numbers, not {row_width!r}")
        self.row_width = row_width
        self.row_bytes = self._bytes_of_a_row()

    def encode(self, vectors_NE: torch.Tensor) -> torch.Tensor:
        """Bytes of rows: uint8 `[N, row_bytes]` on the CPU. A plain codec may return the given memory itself.

        vectors_NE: `[N, row_width]`, any float dtype, any device.
        Raises: StoreError for another shape, and for a number that this codec cannot hold, NaN among them (the first
        is named).
        """
        if vectors_NE.dim() != 2 or vectors_NE.shape[1] != self.row_width:
            raise StoreError(f"{self.name} rows of {self.row_width} numbers are needed, not {tuple(vectors_NE.shape)}")
        vectors_NE = vectors_NE.detach().to("cpu", torch.float32).contiguous()
        self._check_numbers(vectors_NE)
        return self._encode(vectors_NE)

    def decode(self, bytes_NB: torch.Tensor, out_NE: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors `[N, row_width]` of `vector_dtype`, on the device of `bytes_NB` (uint8 `[N, row_bytes]`).

        out_NE: where to write them, contiguous. Without it a plain codec gives a view and copies nothing.
        Raises: StoreError for another shape or dtype.
        """
        self._check_bytes(bytes_NB)
        if out_NE is not None:
            self._check_out(out_NE, bytes_NB)
        return self._decode(bytes_NB, out_NE)

    def to_dict(self) -> dict[str, Any]:
        """The codec as JSON can hold it, for `codec_from_dict`."""
        return {"name": self.name, "row_width": self.row_width, "row_bytes": self.row_bytes}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))

    def __repr__(self) -> str:
        return f"{self.name} codec, {self.row_width} numbers in {self.row_bytes} bytes"

    @abstractmethod
    def _bytes_of_a_row(self) -> int: ...

    @abstractmethod
    def _encode(self, vectors_NE: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _decode(self, bytes_NB: torch.Tensor, out_NE: torch.Tensor | None) -> torch.Tensor: ...

    def _largest(self) -> float:
        """The largest magnitude that a row can hold."""
        return CODED_MAX

    def _check_numbers(self, vectors_NE: torch.Tensor) -> None:
        if vectors_NE.numel() == 0:
            return
        low, high = (float(bound) for bound in vectors_NE.aminmax())
        largest = self._largest()
        if -largest <= low and high <= largest:  # false for NaN, which aminmax passes on
            return
        row, place = (~(vectors_NE.abs().double() <= largest)).nonzero()[0].tolist()
        raise StoreError(
            f"row {row} holds {float(vectors_NE[row, place])} at place {place}: "
            f"{self.name} holds finite numbers up to {largest:g}"
        )

    def _check_bytes(self, bytes_NB: torch.Tensor) -> None:
        if bytes_NB.dtype != torch.uint8 or bytes_NB.dim() != 2 or bytes_NB.shape[1] != self.row_bytes:
            found = f"{str(bytes_NB.dtype).removeprefix('torch.')} {tuple(bytes_NB.shape)}"
            raise StoreError(f"{self.name} rows of {self.row_bytes} uint8 are needed, not {found}")

    def _check_out(self, out_NE: torch.Tensor, bytes_NB: torch.Tensor) -> None:
        shape = (bytes_NB.shape[0], self.row_width)
        fits = out_NE.shape == shape and out_NE.dtype == self.vector_dtype and out_NE.device == bytes_NB.device
        if not fits or not out_NE.is_contiguous():
            raise StoreError(f"{self.name} decodes into a contiguous {self.vector_dtype} tensor of shape {shape}")


class PlainCodec(Codec):
    """Rows whose bytes are the numbers, little-endian."""

    plain = True

    def _bytes_of_a_row(self) -> int:
        return self.row_width * self.vector_dtype.itemsize

    def _largest(self) -> float:
        finfo = torch.finfo(self.vector_dtype)
        half_step = finfo.eps * 2.0 ** (math.frexp(finfo.max)[1] - 2)
        return math.nextafter(finfo.max + half_step, 0)  # beyond this, rounding ends in infinity

    def _encode(self, vectors_NE: torch.Tensor) -> torch.Tensor:
        return vectors_NE.to(self.vector_dtype).view(torch.uint8)

    def _decode(self, bytes_NB: torch.Tensor, out_NE: torch.Tensor | None) -> torch.Tensor:
        size = self.vector_dtype.itemsize
        if bytes_NB.stride(1) != 1 or bytes_NB.stride(0) % size or bytes_NB.storage_offset() % size:
            bytes_NB = moved(bytes_NB)
        vectors_NE = bytes_NB.view(self.vector_dtype)
        return vectors_NE if out_NE is None else out_NE.copy_(vectors_NE)


class Fp32(PlainCodec):
    """float32, as trained."""

    name, tensor_dtype, vector_dtype = "fp32", "F32", torch.float32


class Bf16(PlainCodec):
    """bfloat16: the range of float32, 8 bits of precision."""

    name, tensor_dtype, vector_dtype = "bf16", "BF16", torch.bfloat16


class Fp16(PlainCodec):
    """float16: 11 bits of precision, up to 65,504, coarser below 6e-5."""

    name, tensor_dtype, vector_dtype = "fp16", "F16", torch.float16


class CodedRow(Codec):
    """Rows that are computed when they are read."""

    def _decode(self, bytes_NB: torch.Tensor, out_NE: torch.Tensor | None) -> torch.Tensor:
        if bytes_NB.device.type != "cpu":
            vectors_NE = self.decode_torch(bytes_NB)
            return vectors_NE if out_NE is None else out_NE.copy_(vectors_NE)
        if out_NE is None:
            out_NE = torch.empty(bytes_NB.shape[0], self.row_width)
        self._decode_compiled(bytes_NB.contiguous().numpy(), out_NE.numpy())
        return out_NE

    @abstractmethod
    def decode_torch(self, bytes_NB: torch.Tensor) -> torch.Tensor:
        """`decode` in torch operations, for any device."""

    @abstractmethod
    def _decode_compiled(self, bytes_NB: Any, out_NE: Any) -> None: ...


def moved(bytes_NB: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, in memory that begins where any dtype may."""
    return bytes_NB.clone(memory_format=torch.contiguous_format)
