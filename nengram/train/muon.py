"""Muon: a weight matrix moves as far in every direction that its gradients have.

The momentum of a matrix has a few large singular values and many small ones, and a step along it learns little but the large ones.
Muon steps along the nearest semi-orthogonal matrix instead: the same directions, all at the same length (Jordan 2024,
kellerjordan.github.io/posts/muon). Per matrix of R rows and C columns, with gradient G and momentum M:

    M <- mu M + (1 - mu) G
    U  = NewtonSchulz(mu M + (1 - mu) G)                                 Nesterov's look ahead
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(R, C)) U

A semi-orthogonal U has a root mean square of 1 / sqrt(max(R, C)). The last factor makes that 0.2, about what AdamW's update has, so
rates and decay found for AdamW carry over (Liu et al., 2502.16982, section 2.2). State: one number a weight, half of Adam's.

Newton-Schulz is matrix products alone: with X scaled below norm 1, five times X <- a X + (b A + c A^2) X, A = X X^T. The coefficients
are steep at zero and do not settle: singular values end between 0.7 and 1.2 or so, which costs nothing in loss and saves iterations.
Directions far below the largest (a thousandth, say) do not get there in five steps.

Experts are stacked `[X, R, C]` and each is a matrix of its own; torch's `torch.optim.Muon`, our judge on plain matrices, refuses
them. A fused projection is taken as it is stored, one matrix. The transpose of a weight moves by the transpose of its update, so it
does not matter which side is the input.
"""

import torch
from torch import Tensor

from nengram.errors import ConfigError

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c (Jordan 2024)
NEWTON_SCHULZ_STEPS = 5
MOMENTUM = 0.95
RMS = 0.2  # of an update at rate 1
NORM_FLOOR = 1e-7  # a matrix without a gradient stays at zero


class Muon(torch.optim.Optimizer):
    """Muon on matrices `[R, C]` and stacks of them `[X, R, C]`.

    Args:
        weight_decay: decoupled: a share `lr * weight_decay` of the weight itself, each step.
        dtype: in which Newton-Schulz computes; None: float32 on the CPU, where bfloat16 is slow, and bfloat16 elsewhere.
    Raises: ConfigError for a parameter of another shape.
    """

    def __init__(
        self,
        params,
        lr: float,
        *,
        weight_decay: float = 0.1,
        momentum: float = MOMENTUM,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim not in (2, 3):
                    raise ConfigError(f"Muon takes matrices and stacks of them, not a shape {tuple(weight.shape)}")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)

    def _move(self, weight: Tensor, group: dict) -> None:
        state, mu, lr = self.state[weight], group["momentum"], group["lr"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        mean = state["momentum_buffer"].lerp_(weight.grad, 1 - mu)
        update = orthogonal(weight.grad.lerp(mean, mu), dtype=self.dtype or _dtype_for(weight))
        weight.mul_(1 - lr * group["weight_decay"])
        weight.add_(update, alpha=-lr * RMS * max(weight.shape[-2:]) ** 0.5)


def orthogonal(matrices: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """About the nearest semi-orthogonal matrix of each, for `[R, C]` or `[X, R, C]`; computed in `dtype`, returned as given."""
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    stack_XRC = matrices if matrices.ndim == 3 else matrices.unsqueeze(0)
    wide = (stack_XRC.mT if tall else stack_XRC).to(dtype)
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=NORM_FLOOR)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram_XRR = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram_XRR, gram_XRR, gram_XRR, beta=b, alpha=c), wide, beta=a)
    return (wide.mT if tall else wide).reshape(matrices.shape).to(matrices.dtype)


def _dtype_for(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.device.type == "cpu" else torch.bfloat16
