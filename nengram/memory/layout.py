"""What a released layout must say of itself, so that importing and exporting are written once.

A config is a stranger's JSON: every number is read by name and type, and a mistake says which field it is in. A number
that some writer rounded through a double is refused rather than used: it would give rows that look right.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from nengram.address import AddressSpec
from nengram.errors import CheckpointError
from nengram.memory.checkpoint_files import Checkpoint, Plane, TensorPlan, shown
from nengram.store.codecs import Codec

Origin = dict[str, Any]


class Found(NamedTuple):
    """One layer's table in a checkpoint. origin: what export needs to write the same tensors again; plain JSON."""

    codec: Codec
    planes: tuple[Plane, ...]
    origin: Origin


class Matrix(NamedTuple):
    """Tensors to be written that hold one matrix, one below the other: names with their rows, dtype, columns."""

    parts: tuple[tuple[str, int], ...]
    dtype: str
    width: int

    def plans(self) -> list[TensorPlan]:
        return [TensorPlan(name, self.dtype, (rows, self.width)) for name, rows in self.parts]


class Tensors(NamedTuple):
    """All tensors of one table: its matrices, in the order of a row's bytes, and small ones with their content."""

    matrices: tuple[Matrix, ...]
    small: tuple[tuple[TensorPlan, bytes], ...] = ()


class Layout(Protocol):
    """One family's checkpoints."""

    name: str

    def is_in(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint has tensors of this layout."""

    def spec_of(self, config: Mapping[str, Any], pad_cid: int | None = None) -> AddressSpec:
        """The addresses that a config describes. pad_cid: the compressed id of the pad token, where it is known.

        Raises: CheckpointError, AddressError, naming the field.
        """

    def find(self, checkpoint: Checkpoint, spec: AddressSpec, layer_id: int, scale: float | None) -> Found | None:
        """The table of one layer; None when the checkpoint has no tensor of it. scale: where no tensor holds one."""

    def config_of(self, spec: AddressSpec, row_width: int) -> dict[str, Any]:
        """The config fields for addresses of this family's kind; the caller checks that they give `spec` again."""

    def tensors(self, codec: Codec, spec: AddressSpec, layer_id: int, origin: Origin) -> Tensors:
        """How a table is cut into tensors. Raises: CheckpointError when its codec has no place in this layout."""


def section_of(config: Mapping[str, Any], marker: str) -> Mapping[str, Any]:
    """The part of a config that has the field `marker`: `text_config` of a multimodal model, or the whole."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and marker in inner else config


def integer_of(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A whole number of a config. Raises: CheckpointError when it is missing without default, or anything else."""
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int):
        found = "missing" if value is None else f"{shown(value)}, not a whole number"
        raise CheckpointError(f"config field {field} is {found}")
    return value


def integers_of(config: Mapping[str, Any], field: str) -> list[int]:
    """A list of whole numbers of a config, not empty. Raises: CheckpointError."""
    values = config.get(field)
    if not isinstance(values, list) or not values or any(type(value) is not int for value in values):
        found = "missing" if values is None else f"{shown(values)}, not a list of whole numbers"
        raise CheckpointError(f"config field {field} is {found}")
    return values


def text_of(origin: Origin, field: str, default: str) -> str:
    """A text that an earlier import noted; a table file may have been edited since."""
    value = origin.get(field, default)
    return value if isinstance(value, str) and value else default
