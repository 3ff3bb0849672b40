"""The layer against numbers of the public demo: gates, gated values and output, in both precisions."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nengram.memory import Engram

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_vectors.json").read_text())["module_forward"]
BRANCHES, KERNEL = GOLDEN["config"]["hc_mult"], GOLDEN["config"]["kernel_size"]


def sine(shape: list[int], formula: str, a: float = 0.0, b: float = 0.0) -> torch.Tensor:
    i = np.arange(math.prod(shape), dtype=np.float64)
    return torch.from_numpy(eval(formula, {"sin": np.sin, "a": a, "b": b, "i": i})).view(shape)


PARAMETERS = {p.pop("name"): sine(**p) for p in (dict(p) for p in GOLDEN["parameters"])}


def stacked(name: str) -> torch.Tensor:
    return torch.stack([PARAMETERS[f"{name.format(g)}"] for g in range(BRANCHES)])


def the_layer(dtype: torch.dtype) -> Engram:
    config = GOLDEN["config"]
    memory_width = PARAMETERS["value_proj.weight"].shape[1]
    layer = Engram(
        memory_width,
        config["hidden_size"],
        branches=BRANCHES,
        kernel=KERNEL,
        dilation=config["conv_dilation"],
        conv_eps=config["conv_norm_eps"],
        bias=True,
    ).to(dtype)
    layer.load_state_dict(
        {
            "key_proj.weight": stacked("key_projs.{}.weight").flatten(0, 1),
            "key_proj.bias": stacked("key_projs.{}.bias").flatten(),
            "value_proj.weight": PARAMETERS["value_proj.weight"],
            "value_proj.bias": PARAMETERS["value_proj.bias"],
            "key_gain": stacked("norm1.{}.weight"),
            "query_gain": stacked("norm2.{}.weight"),
            "conv_gain": stacked("short_conv.norms.{}.weight"),
            "conv_weight": PARAMETERS["short_conv.conv.weight"].view(BRANCHES, -1, KERNEL).permute(2, 0, 1),
        }
    )
    return layer


def the_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    offsets_S = torch.tensor(GOLDEN["layout"]["layers"]["1"]["row_offsets"])
    rows_BTS = torch.tensor(GOLDEN["results"]["hash_ids_layer1"]) + offsets_S
    vecs_BTSE = PARAMETERS["multi_head_embedding.embedding.weight"][rows_BTS]
    return vecs_BTSE.to(dtype), sine(**GOLDEN["hidden_states"]).to(dtype)


@pytest.mark.parametrize(("name", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_forward_is_the_demos(name, tolerance):
    dtype = getattr(torch, name)
    expected = {key: torch.tensor(value, dtype=dtype) for key, value in GOLDEN["results"][name].items()}
    layer, (vecs_BTSE, hidden_BTGD) = the_layer(dtype), the_inputs(dtype)
    close = {"rtol": tolerance, "atol": tolerance}
    with torch.no_grad():
        gates_BTG = layer.gates(vecs_BTSE, hidden_BTGD)
        delta_BTGD = layer(vecs_BTSE, hidden_BTGD)
        gated_TD = gates_BTG[0, :, :1] * layer.value_proj(vecs_BTSE[0].flatten(1))
    torch.testing.assert_close(gates_BTG, expected["gates_BTM"], **close)
    torch.testing.assert_close(gated_TD, expected["value_first_branch_B0"], **close)
    torch.testing.assert_close(delta_BTGD, expected["output_BTMD"], **close)
    assert delta_BTGD.sum().item() == pytest.approx(expected["output_sum"].item(), rel=10 * tolerance)
