"""Our layer of the family `qwen_ple` against transformers' own `qwen4_exp`: rows, gate, convolution, output and gradients.

A small random model of theirs, its weights through `from_qwen_ple`, our addresses from `AddressSpec.qwen_ple`. Their norms
take statistics in float32 whatever the model's dtype, so as shipped the two agree to float32 alone; with that one line of
theirs in float64 they agree to float64, which would show any difference in the formulas.
"""

import pytest
import torch

from nengram.address import Addresser, AddressSpec
from nengram.memory import Engram
from nengram.memory.layer_layouts import from_qwen_ple

pytest.importorskip(
    "transformers.models.qwen4_exp", reason="the other side of the comparison is transformers' own code"
)

from transformers import DynamicCache
from transformers.models.qwen4_exp import modeling_qwen4_exp as theirs
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

VOCAB, EOS, WIDTH, BRANCHES, HEADS, ROW_WIDTH, EPS = 40, 7, 6, 3, 2, 5, 1e-5
BATCH, LENGTH = 3, 29
PLE_BLOCKS = [2, 3]  # counted from one
TOLERANCE = {"as shipped": 1e-5, "statistics in float64": 1e-11}


class Pair:
    """One PLE layer of theirs and the same as ours, with the addresses of both."""

    def __init__(self, order: int, place: int):
        self.config = Qwen4ExpTextConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=4,
            hc_count=BRANCHES,
            ple_layer_ids=PLE_BLOCKS,
            ple_embed_dim=(order - 1) * HEADS * ROW_WIDTH,
            ngram_size=order,
            heads_per_ngram=HEADS,
            ngram_vocab_size_base=50,
            rms_norm_eps=EPS,
            eos_token_id=EOS,
        )
        self.place, self.block = place, PLE_BLOCKS[place] - 1
        self.ple = theirs.Qwen4ExpTextPLELayer(self.config, self.block, place).double()
        generator = torch.Generator().manual_seed(order)
        with torch.no_grad():
            for _, parameter in sorted(self.ple.named_parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
        self.spec = AddressSpec.qwen_ple(
            vocab_size=VOCAB, eos_id=EOS, ple_layer_ids=PLE_BLOCKS, rows_per_head=50, max_order=order, heads=HEADS
        )
        memory_width = self.config.ple_embed_dim
        options = {"branches": BRANCHES, "dilation": order, "gate_eps": EPS, "conv_eps": EPS}
        self.layer = Engram.family("qwen_ple", memory_width, WIDTH, **options).double()
        self.layer.load_state_dict(from_qwen_ple(self.ple.state_dict()))
        self.addresser = Addresser(self.spec)
        self.table = self.ple.ple_embedding.ngram_embedding.weight.detach().clone()

    def rows(self, ids_BT, **flags) -> torch.Tensor:
        return self.addresser(ids_BT, **flags)[self.place]

    def ours(self, ids_BT, hidden_BTGD, *, mask_BT=None, addresses=None, state=None) -> torch.Tensor:
        blocked_BT = None if mask_BT is None else ~mask_BT
        vecs_BTSE = self.table[self.rows(ids_BT, blocked_BT=blocked_BT, state=addresses)]
        return self.layer(vecs_BTSE, hidden_BTGD, blocked_BT=blocked_BT, state=state)

    def its(self, ids_BT, hidden_BTGD, *, mask_BT=None, cache=None) -> torch.Tensor:
        """Their layer as their model calls it: masked ids are the EOS id, and the mask goes on to the convolution."""
        if mask_BT is not None:
            ids_BT = torch.where(mask_BT, ids_BT, EOS)
        mask = None if mask_BT is None else mask_BT.double()
        return self.ple(hidden_BTGD.flatten(2), ids_BT, cache, conv_mask=mask).unflatten(-1, (BRANCHES, WIDTH))

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.config)


@pytest.fixture(params=TOLERANCE)
def tolerance(request, monkeypatch) -> dict[str, float]:
    """As shipped, or with their norm in the dtype of its input; what may differ then."""
    if request.param != "as shipped":
        exact = lambda norm, x: norm._norm(x) * (1.0 + norm.weight)  # noqa: E731
        monkeypatch.setattr(theirs.Qwen4ExpTextRMSNorm, "forward", exact)
    return {"rtol": TOLERANCE[request.param], "atol": TOLERANCE[request.param]}


@pytest.fixture(params=[(3, 0), (3, 1), (4, 1)], ids=["bigrams and trigrams", "second layer", "to 4-grams"])
def pair(request) -> Pair:
    return Pair(*request.param)


def inputs(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids_BT = torch.randint(0, VOCAB, (BATCH, length), generator=generator)
    ids_BT[torch.rand(ids_BT.shape, generator=generator) < 0.15] = EOS
    return ids_BT, torch.randn(BATCH, length, BRANCHES, WIDTH, generator=generator, dtype=torch.float64)


def test_numbers_of_the_addresses_are_the_same(pair):
    embedding = pair.ple.ple_embedding
    assert embedding.layer_multipliers.tolist() == pair.spec.multipliers(pair.place).tolist()
    assert embedding.ngram_heads_vocab_sizes.tolist() == pair.spec.moduli(pair.place).tolist()
    assert embedding.ngram_heads_offsets.tolist() == pair.spec.offsets(pair.place).tolist()
    assert embedding.ngram_embedding.weight.shape == (pair.spec.num_rows(pair.place), ROW_WIDTH)


def rows_they_read(pair: Pair, ids_BT, cache=None) -> torch.Tensor:
    seen = []
    hook = pair.ple.ple_embedding.ngram_embedding.register_forward_hook(
        lambda module, given, out: seen.append(given[0])
    )
    pair.ple.ple_embedding(ids_BT, cache)
    hook.remove()
    return seen[0]


def test_rows_are_the_same_whole_and_token_by_token(pair):
    ids_BT, _ = inputs()
    rows_BTS = pair.rows(ids_BT)
    assert torch.equal(rows_they_read(pair, ids_BT), rows_BTS)
    cache, state = pair.new_cache(), pair.addresser.new_state(BATCH)
    for t in range(LENGTH):
        now = slice(t, t + 1)
        assert torch.equal(rows_they_read(pair, ids_BT[:, now], cache), rows_BTS[:, now]), t
        assert torch.equal(pair.rows(ids_BT[:, now], state=state), rows_BTS[:, now])


@torch.no_grad()
def test_gate_and_convolution_are_the_same_each_by_itself(pair, tolerance):
    ids_BT, hidden_BTGD = inputs()
    seen = {}
    hooks = [
        pair.ple.norm_conv.register_forward_pre_hook(lambda module, given: seen.update(gated=given[0])),
        pair.ple.value_proj.register_forward_hook(lambda module, given, out: seen.update(value=out)),
    ]
    whole_BTGD = pair.its(ids_BT, hidden_BTGD)
    for hook in hooks:
        hook.remove()
    gated_BTGD = seen["gated"].unflatten(-1, (BRANCHES, WIDTH))
    value_BT1D = seen["value"].unsqueeze(2)
    largest = value_BT1D.abs().argmax(-1, keepdim=True).expand(-1, -1, BRANCHES, -1)
    expected_BTG = (gated_BTGD.gather(-1, largest) / value_BT1D.expand_as(gated_BTGD).gather(-1, largest)).squeeze(-1)
    vecs_BTSE = pair.table[pair.rows(ids_BT)]
    torch.testing.assert_close(pair.layer.gates(vecs_BTSE, hidden_BTGD), expected_BTG, **tolerance)
    pair.layer.conv = False
    ours_BTGD = pair.layer(vecs_BTSE, hidden_BTGD)
    pair.layer.conv = True
    torch.testing.assert_close(ours_BTGD, gated_BTGD, **tolerance)
    convolved_BTGD = pair.layer(vecs_BTSE, hidden_BTGD) - ours_BTGD
    assert convolved_BTGD.abs().max() > 0.1
    torch.testing.assert_close(convolved_BTGD, whole_BTGD - gated_BTGD, **tolerance)


@pytest.mark.parametrize("length", [1, 2, LENGTH])
def test_output_and_all_gradients_are_the_same(pair, tolerance, length):
    ids_BT, hidden_BTGD = inputs(length)
    one, other = hidden_BTGD.clone().requires_grad_(), hidden_BTGD.clone().requires_grad_()
    pair.table.requires_grad_()
    ours_BTGD, its_BTGD = pair.ours(ids_BT, one), pair.its(ids_BT, other)
    torch.testing.assert_close(ours_BTGD, its_BTGD, **tolerance)
    weigh = torch.linspace(-1, 1, ours_BTGD.numel(), dtype=torch.float64).view(ours_BTGD.shape)
    for delta_BTGD in (ours_BTGD, its_BTGD):
        (delta_BTGD * weigh).sum().backward()
    grads = {name: parameter.grad for name, parameter in pair.ple.named_parameters()}
    expected = from_qwen_ple(grads)
    expected |= {name: expected[name] - 1.0 for name in ("query_gain", "key_gain", "conv_gain")}  # d(1 + w) = dw
    found = {name: parameter.grad for name, parameter in pair.layer.named_parameters()}
    expected |= {"hidden": other.grad, "table": grads["ple_embedding.ngram_embedding.weight"]}
    found |= {"hidden": one.grad, "table": pair.table.grad}
    assert set(found) == set(expected)
    for name, grad in expected.items():
        scale = grad.abs().max()
        assert grad.any(), name
        torch.testing.assert_close(found[name] / scale, grad / scale, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("cuts", [[LENGTH], [1] * LENGTH, [10, 1, 1, 1, 16], [2, 27], [20, 9]], ids=str)
@torch.no_grad()
def test_prefill_in_chunks_and_decoding_follow_their_cache(pair, tolerance, cuts):
    ids_BT, hidden_BTGD = inputs()
    cache, addresses, state = pair.new_cache(), pair.addresser.new_state(BATCH), pair.layer.new_state(BATCH)
    whole_BTGD = pair.its(ids_BT, hidden_BTGD)
    for chunk in torch.arange(LENGTH).split(cuts):
        given = ids_BT[:, chunk], hidden_BTGD[:, chunk]
        its_BTGD = pair.its(*given, cache=cache)
        ours_BTGD = pair.ours(*given, addresses=addresses, state=state)
        torch.testing.assert_close(ours_BTGD, its_BTGD, **tolerance)
        torch.testing.assert_close(ours_BTGD, whole_BTGD[:, chunk], **tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_under_a_padding_mask_real_positions_are_the_same(pair, tolerance, side):
    ids_BT, hidden_BTGD = inputs()
    mask_BT = torch.arange(LENGTH) < torch.tensor([[LENGTH], [11], [3]])
    mask_BT = mask_BT.flip(1) if side == "left" else mask_BT
    theirs_rows = rows_they_read(pair, torch.where(mask_BT, ids_BT, EOS))
    assert torch.equal(pair.rows(ids_BT, blocked_BT=~mask_BT)[mask_BT], theirs_rows[mask_BT])
    its_BTGD = pair.its(ids_BT, hidden_BTGD, mask_BT=mask_BT)
    ours_BTGD = pair.ours(ids_BT, hidden_BTGD, mask_BT=mask_BT)
    torch.testing.assert_close(ours_BTGD[mask_BT], its_BTGD[mask_BT], **tolerance)


@torch.no_grad()
def test_a_left_padded_batch_decodes_on_as_theirs(pair, tolerance):
    ids_BT, hidden_BTGD = inputs()
    prompt = 15
    mask_BT = torch.arange(prompt) >= torch.tensor([[0], [6], [13]])
    cache, addresses, state = pair.new_cache(), pair.addresser.new_state(BATCH), pair.layer.new_state(BATCH)
    given = ids_BT[:, :prompt], hidden_BTGD[:, :prompt]
    pair.its(*given, mask_BT=mask_BT, cache=cache)
    pair.ours(*given, mask_BT=mask_BT, addresses=addresses, state=state)
    for t in range(prompt, LENGTH):
        given = ids_BT[:, t : t + 1], hidden_BTGD[:, t : t + 1]
        its_BTGD = pair.its(*given, cache=cache)
        torch.testing.assert_close(pair.ours(*given, addresses=addresses, state=state), its_BTGD, **tolerance)
