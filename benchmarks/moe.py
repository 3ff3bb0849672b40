"""What does sparsity cost? The MoE layer against one dense SwiGLU that computes just as much.

Equal active width: K experts of F and a shared one of S against a dense layer of K x F + S. The quotient is the price of routing,
sorting, small matrices and gradients of experts that fewer tokens share; 1.0 cannot be reached. Forward and backward, gradients of
the input and of all weights, made anew as after `zero_grad(set_to_none=True)`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from benchmarks.gates import check_moe
from benchmarks.measure import interleave
from benchmarks.report import figure, result
from nengram.model.init import Draws
from nengram.model.moe import MoE, SwiGLU


@dataclass(frozen=True)
class Sizes:
    """32 experts of half the width and a shared one of the same, as `split_budget` makes them."""

    widths: tuple[int, ...] = (128, 256)
    tokens: int = 1024
    experts: int = 32
    per_token: int = 2
    checked_tokens: int = 64  # the reference is a loop over tokens
    pairs: int = 40


FULL = Sizes()


def run(sizes: Sizes = FULL) -> dict:
    """The result of this benchmark. Raises RedGate."""
    figures, absolute = [], {}
    for width in sizes.widths:
        inner = width // 2
        generator = torch.Generator().manual_seed(0)
        moe, dense = (
            MoE(width, sizes.experts, sizes.per_token, inner, inner),
            SwiGLU(width, (sizes.per_token + 1) * inner),
        )
        for layer in (moe, dense):
            layer.init_weights(Draws(0), out_share=1.0)
        hidden_BTD = torch.randn(1, sizes.tokens, width, generator=generator)
        check_moe(moe, hidden_BTD[:, : sizes.checked_tokens])
        grad_BTD = torch.randn(hidden_BTD.shape, generator=generator)
        timings = interleave(
            lambda given, moe=moe: forward_backward(moe, *given),
            lambda given, dense=dense: forward_backward(dense, *given),
            lambda given=(hidden_BTD, grad_BTD): given,
            sizes.pairs,
        )
        name = f"MoE / dense SwiGLU, width {width}, active {(sizes.per_token + 1) * inner}"
        figures.append(figure(name, timings.cost, "x", ("<=", 2.2)))
        absolute |= {
            f"moe_ms_width_{width}": 1e3 * np.median(timings.ours_s),
            f"dense_ms_width_{width}": 1e3 * np.median(timings.theirs_s),
        }
    what = f"MoE forward + backward, {sizes.experts} experts, top {sizes.per_token}, {sizes.tokens:,} tokens"
    gate = "output and all gradients agree with the loop over tokens and experts"
    return result("moe", what, gate, figures, absolute)


def forward_backward(layer: nn.Module, hidden_BTD: torch.Tensor, grad_BTD: torch.Tensor) -> None:
    """One pass in each direction, gradients starting from nothing."""
    layer.zero_grad(set_to_none=True)
    layer(hidden_BTD.detach().requires_grad_()).backward(grad_BTD)
