"""The short causal convolution of an Engram: a few dilated taps per channel, and what decoding remembers.

A depthwise convolution with four taps is four shifted products; as such it is limited by memory alone.
`F.conv1d` with one group per channel is not made for this, and autograd's own backward of the shifts fills a
zero tensor per tap, so the taps have a backward pass of their own. Forward and backward of 8 x 128 tokens at
D = 128 on one CPU core: 5.4 ms as conv1d, 2.0 as shifts under autograd, 0.8 here; with four branches 18, 7.5
and 3.1.
"""

from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class ConvPast(Protocol):
    """Whatever remembers a convolution's inputs from one call to the next: a `ConvState`, or a cache that somebody else keeps."""

    def extend(self, inputs_BTGD: torch.Tensor, start_BT: torch.Tensor | None = None) -> torch.Tensor:
        """The remembered inputs followed by new ones, `[B, P + T, G, D]`, which are then remembered."""
        ...


class ConvState:
    """What the convolution remembers between calls: its last (kernel - 1) x dilation inputs, `[B, P, G, D]`.

    Zeros at the start of a sequence. A forward pass that is given a state updates it in place.
    """

    def __init__(self, inputs_BPGD: torch.Tensor) -> None:
        self.inputs_BPGD = inputs_BPGD

    def extend(self, inputs_BTGD: torch.Tensor, start_BT: torch.Tensor | None = None) -> torch.Tensor:
        """The remembered inputs followed by new ones, `[B, P + T, G, D]`; remembers the last P of them.

        start_BT: what lies before the last start is remembered as zeros, since nothing later will hear it.
        """
        past = self.inputs_BPGD.shape[1]
        whole = torch.cat([self.inputs_BPGD.to(inputs_BTGD.dtype), inputs_BTGD], dim=1)
        kept = whole[:, whole.shape[1] - past :].detach()
        if start_BT is not None:
            text_BH = _texts(start_BT, past)
            kept = kept * (text_BH[:, text_BH.shape[1] - past :] == text_BH[:, -1:])[..., None, None]
        self.inputs_BPGD.copy_(kept)
        return whole

    def snapshot(self) -> torch.Tensor:
        """A copy to `restore` later, as when drafted tokens are rejected."""
        return self.inputs_BPGD.clone()

    def restore(self, snapshot: torch.Tensor) -> None:
        """Return to a snapshot of the same batch."""
        self.inputs_BPGD.copy_(snapshot)

    def reorder(self, index_B: torch.Tensor) -> None:
        """Let sequence b go on as sequence `index_B[b]`, as beam search does; the batch may change size."""
        self.inputs_BPGD = self.inputs_BPGD.index_select(0, index_B)


def dilated_taps(heard: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
    """y[t] = sum over i of weight[i] * heard[t + i * dilation], per channel: `[B, T, G, D]`.

    heard: `[B, P + T, G, D]`, the P = (kernel - 1) x dilation inputs before the first output, then its T own.
    weight: `[kernel, G, D]`; the LAST tap multiplies the current position, as in `nn.Conv1d`.
    """
    if (
        not torch.is_grad_enabled()
    ):  # a decoding step is all overhead, and that of a Function is a third of the convolution's
        return DilatedTaps.forward(heard, weight, dilation)
    return DilatedTaps.apply(heard, weight, dilation)


def taps_within(heard: torch.Tensor, weight: torch.Tensor, dilation: int, start_BT: torch.Tensor) -> torch.Tensor:
    """`dilated_taps` whose every tap is silent when a start lies between what it would hear and its own position.

    Under plain autograd: an option that no published model has need not be fast.
    """
    text_BH = _texts(start_BT, heard.shape[1] - start_BT.shape[1])
    own_BT = text_BH[:, text_BH.shape[1] - start_BT.shape[1] :]
    windows, texts = _windows(heard, weight, dilation), _windows(text_BH, weight, dilation)
    taps = (
        window_BTGD * (text_BT == own_BT)[..., None, None] * tap_GD
        for window_BTGD, text_BT, tap_GD in zip(windows, texts, weight, strict=True)
    )
    return sum(taps)


def _texts(start_BT: torch.Tensor, past: int) -> torch.Tensor:
    """A number for the text that each position belongs to, `[B, past + T]`; the past belongs to text 0."""
    return torch.nn.functional.pad(start_BT.cumsum(1), (past, 0))


class DilatedTaps(torch.autograd.Function):
    """`dilated_taps` with its gradients: each tap sends the gradient back through the same shift."""

    @staticmethod
    def forward(heard: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
        windows = _windows(heard, weight, dilation)
        y_BTGD = next(windows) * weight[0]
        for window_BTGD, tap_GD in zip(windows, weight[1:], strict=True):
            y_BTGD.addcmul_(window_BTGD, tap_GD)
        return y_BTGD

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        heard, weight, ctx.dilation = inputs
        ctx.save_for_backward(heard, weight)

    @staticmethod
    def backward(ctx, grad_BTGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        heard, weight = ctx.saved_tensors
        grad_heard = torch.zeros_like(heard)
        for window_BTGD, tap_GD in zip(_windows(grad_heard, weight, ctx.dilation), weight, strict=True):
            window_BTGD.addcmul_(grad_BTGD, tap_GD)
        windows = _windows(heard, weight, ctx.dilation)
        grad_weight = torch.stack([(grad_BTGD * window_BTGD).sum((0, 1)) for window_BTGD in windows])
        return grad_heard, grad_weight, None


def _windows(heard: torch.Tensor, weight: torch.Tensor, dilation: int):
    """The T positions that each tap reads, first tap first."""
    length = heard.shape[1] - (len(weight) - 1) * dilation
    return (heard[:, i * dilation : i * dilation + length] for i in range(len(weight)))
