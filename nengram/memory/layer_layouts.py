"""The weights of one memory layer under the names of the families that published them, both ways.

A table is converted by bytes (`layouts.py`); what stands around it is a handful of matrices, so plain dicts of tensors
suffice. Two things differ beside the names. Qwen's norms multiply by (1 + weight), ours by a gain. DeepSeek makes keys and
value with one matrix; our layer does so with `fused=True`, and `fuse` and `separate` change between the forms exactly.

    layer = Engram.family("deepseek_v41", memory_width, width, branches=4)
    layer.load_state_dict(from_deepseek_v41(tensors, prefix="layers.1."))
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from nengram.errors import CheckpointError, nearest

State = Mapping[str, Tensor]
QWEN_NORMS = {"norm_key.weight": "key_gain", "norm_query.weight": "query_gain", "norm_conv.weight": "conv_gain"}
QWEN_PROJECTIONS = ("key_proj.weight", "value_proj.weight")
QWEN_CONV = "conv1d.weight"
DEEPSEEK_NAMES = {
    "engram.wkv.weight": "kv_proj.weight",
    "engram.q_weight": "query_gain",
    "engram.k_weight": "key_gain",
}
DEEPSEEK_SCALE, DEEPSEEK_BLOCK = "engram.wkv.scale", 32


def from_qwen_ple(tensors: State, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of `Engram.family("qwen_ple", ...)` from a PLE layer's tensors, e.g. under "model.layers.1.ple.".

    A gain is 1 + weight in float32 at least, which is what Qwen's own code multiplies by. The table's tensors are not read.
    Raises: CheckpointError for a missing tensor, or shapes that are no layer.
    """
    key, value = (_tensor(tensors, prefix, name, 2) for name in QWEN_PROJECTIONS)
    width = value.shape[0]
    branches = _branches(prefix + QWEN_PROJECTIONS[0], key.shape[0], width)
    state = {QWEN_PROJECTIONS[0]: key, QWEN_PROJECTIONS[1]: value}
    for theirs, ours in QWEN_NORMS.items():
        weight = _tensor(tensors, prefix, theirs, 1)
        state[ours] = 1.0 + _shaped(prefix + theirs, _wide(weight), (branches, width))
    taps = _tensor(tensors, prefix, QWEN_CONV, 3)
    kernel = taps.shape[2]
    state["conv_weight"] = _shaped(prefix + QWEN_CONV, taps, (branches, width, kernel)).permute(2, 0, 1).contiguous()
    return state


def to_qwen_ple(state: State, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a PLE layer, without its table. The inverse of `from_qwen_ple`, but for weights rounded beside 1.

    1 + weight comes out as the same float, so the layer computes the same; a weight far below 1 may differ by 6e-8.
    Raises: CheckpointError for a layer that Qwen's cannot be: fused, biased, or without a convolution.
    """
    found = _exactly(
        separate(state) if "kv_proj.weight" in state else state,
        (*QWEN_PROJECTIONS, *QWEN_NORMS.values(), "conv_weight"),
    )
    named = {prefix + name: found[name] for name in QWEN_PROJECTIONS}
    named |= {prefix + theirs: found[ours].flatten() - 1.0 for theirs, ours in QWEN_NORMS.items()}
    taps_GDK = found["conv_weight"].permute(1, 2, 0)
    return named | {prefix + QWEN_CONV: taps_GDK.flatten(0, 1).unsqueeze(1).contiguous()}


def from_deepseek_v41(tensors: State, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of `Engram.family("deepseek_v41", ...)` from a layer's tensors, e.g. under "layers.1.".

    With `engram.wkv.scale` beside it the matrix is FP8 in blocks of 32 x 32 and comes out as float32. Only the product of
    `q_weight` and `k_weight` is ever used; both are kept, so that the way back is exact.
    Raises: CheckpointError for a missing tensor, or shapes that are no layer.
    """
    state = {ours: _tensor(tensors, prefix, theirs, 2) for theirs, ours in DEEPSEEK_NAMES.items()}
    branches, width = state["query_gain"].shape
    if state["key_gain"].shape != (branches, width) or state["kv_proj.weight"].shape[0] != (branches + 1) * width:
        shapes = ", ".join(f"{prefix}{theirs} {list(state[ours].shape)}" for theirs, ours in DEEPSEEK_NAMES.items())
        raise CheckpointError(f"{shapes}: not [(G + 1) D, M], [G, D] and [G, D] of one layer")
    if prefix + DEEPSEEK_SCALE in tensors:
        scale = _tensor(tensors, prefix, DEEPSEEK_SCALE, 2)
        state["kv_proj.weight"] = _descaled(prefix + DEEPSEEK_SCALE, state["kv_proj.weight"], scale)
    return state


def to_deepseek_v41(state: State, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a DeepSeek-V4.1 layer, without its table, the matrix in floats. The inverse of `from_deepseek_v41`.

    Raises: CheckpointError for a layer that DeepSeek's cannot be: biased, or with a convolution.
    """
    found = _exactly(state if "kv_proj.weight" in state else fuse(state), DEEPSEEK_NAMES.values())
    return {prefix + theirs: found[ours] for theirs, ours in DEEPSEEK_NAMES.items()}


def fuse(state: State) -> dict[str, Tensor]:
    """The state dict of a layer with `fused=True` from that of the same layer without. Raises: CheckpointError without keys."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(("key_proj.", "value_proj."))}
    _require(state, QWEN_PROJECTIONS)
    for kind in ("weight", "bias"):
        parts = [state[f"{part}_proj.{kind}"] for part in ("key", "value") if f"{part}_proj.{kind}" in state]
        if parts:
            kept[f"kv_proj.{kind}"] = torch.cat(parts)
    return kept


def separate(state: State) -> dict[str, Tensor]:
    """The inverse of `fuse`, number for number."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("kv_proj.")}
    _require(state, ("kv_proj.weight", "key_gain"))
    keys = state["key_gain"].numel()
    for kind in ("weight", "bias"):
        if f"kv_proj.{kind}" in state:
            whole = state[f"kv_proj.{kind}"]
            kept |= {f"key_proj.{kind}": whole[:keys].clone(), f"value_proj.{kind}": whole[keys:].clone()}
    return kept


def _tensor(tensors: State, prefix: str, name: str, axes: int) -> Tensor:
    _require(tensors, (prefix + name,))
    tensor = tensors[prefix + name]
    if tensor.dim() != axes:
        raise CheckpointError(f"{prefix}{name} is {list(tensor.shape)}: it should have {axes} axes")
    return tensor


def _require(tensors: State, names: Collection[str]) -> None:
    for name in names:
        if name not in tensors:
            raise CheckpointError(f"no tensor {name}{nearest(name, tensors)} among the {len(tensors)} given")


def _exactly(state: State, names: Collection[str]) -> State:
    """The state, if it has these tensors and no other. Raises: CheckpointError."""
    _require(state, names)
    if left := sorted(set(state) - set(names)):
        raise CheckpointError(f"the layer has {', '.join(left)}, for which the family has no place")
    return state


def _branches(name: str, keys: int, width: int) -> int:
    branches, left = divmod(keys, width)
    if left or not branches:
        raise CheckpointError(f"{name} makes {keys} numbers, which are not keys of width {width}")
    return branches


def _shaped(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    size = torch.Size(shape).numel()
    if tensor.numel() != size:
        raise CheckpointError(f"{name} holds {tensor.numel()} numbers, this layer needs {size}")
    return tensor.reshape(shape)


def _descaled(name: str, values: Tensor, scale: Tensor) -> Tensor:
    """float32 values of a matrix in blocks of 32 x 32, one scale each."""
    if any(-(-size // DEEPSEEK_BLOCK) != blocks for size, blocks in zip(values.shape, scale.shape, strict=True)):
        raise CheckpointError(
            f"{name} is {list(scale.shape)}, not a scale for each {DEEPSEEK_BLOCK} x {DEEPSEEK_BLOCK} of {list(values.shape)}"
        )
    wide = scale.float().repeat_interleave(DEEPSEEK_BLOCK, 0).repeat_interleave(DEEPSEEK_BLOCK, 1)
    return values.float() * wide[: values.shape[0], : values.shape[1]]


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()
