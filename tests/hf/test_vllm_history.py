"""What came before each token of a flat row is what its own text says, however an engine cuts, mixes, shares and rejects."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nengram.errors import ConfigError
from nengram.hf.lookback import NOTHING, Lookback
from nengram.hf.vllm_history import FlatRow, PagedConv, history, new_slots, window_of
from nengram.model import Transformer
from tests.hf.paged import VOCABULARY, Engine
from tests.model.test_dialect_models import FOLDED, MEMORIES, built

SEEDS = st.integers(0, 2**32)
FEW = settings(max_examples=30, deadline=None)


def before(text: tuple[int, ...] | None, count: int) -> list[int]:
    """The slow twin: the ids before a text's last, most recent first."""
    return ([*reversed(text[:-1])] + [NOTHING] * count)[:count]


def no_ids() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int32)


@FEW
@given(SEEDS, st.sampled_from([1, 2, 4, 16]), st.integers(1, 4), st.integers(1, 4))
def test_ids_before_every_token_are_those_of_its_own_text(seed, block_size, count, window):
    """From slots alone, from slots behind a window of prompts, and from a window that knows all, without slots."""
    engine = Engine(Random(seed), block_size, window)
    alone_N, behind_N = (new_slots(engine.slots, like=no_ids(), nothing=NOTHING) for _ in range(2))
    for _ in range(20):
        served = engine.step()
        row, ids_T = served.row, served.ids_T
        found = {
            "slots": history(ids_T, row, count, slots_N=alone_N),
            "window and slots": history(ids_T, row, count, slots_N=behind_N, window_RW=served.window_RW),
        }
        if window >= count:
            found["window"] = history(ids_T, row, count, window_RW=served.whole_RW)
        row.check()
        for at, text in enumerate(served.texts):
            if text is not None:
                for way, ids_TP in found.items():
                    assert ids_TP[at].tolist() == before(text, count), (way, text)


@FEW
@given(SEEDS, st.sampled_from([1, 4, 16]), st.integers(1, 9))
def test_a_convolution_hears_its_own_text(seed, block_size, past):
    engine, inputs = Engine(Random(seed), block_size, 1), {}

    def of(text: tuple[int, ...]) -> torch.Tensor:
        """An input that the whole text before it has made, as hidden states are."""
        return inputs.setdefault(text, torch.randn(2, 3))

    slots_NGD = new_slots(engine.slots, 2, 3, like=torch.empty(0))
    for _ in range(20):
        served = engine.step()
        given_BTGD = torch.stack([torch.zeros(2, 3) if text is None else of(text) for text in served.texts])[:, None]
        heard = PagedConv(served.row, slots_NGD, past).extend(given_BTGD)
        for at, text in enumerate(served.texts):
            if text is not None:
                ends = range(len(text) - past, len(text) + 1)
                assert torch.equal(heard[at], torch.stack([of(text[:e]) if e > 0 else torch.zeros(2, 3) for e in ends]))


def test_the_engine_of_these_tests_shares_and_rejects():
    engine = Engine(Random(0), 4, 2)
    rows = [engine.step() for _ in range(200)]
    assert engine.hits > 20 and engine.rejected > 20
    assert max(len(served.row.starts_R1) for served in rows) > 3
    assert any(None in served.texts for served in rows)


@pytest.mark.parametrize("dialect", MEMORIES)
def test_a_memory_layer_reads_the_same_in_flat_rows_as_in_whole_texts(dialect):
    """Rows, gates and convolution of every dialect: the update of each token is that of its whole text."""
    model = built(dialect, cids_V=FOLDED if dialect != "qwen_ple" else None)
    spec, hidden, engine = model.spec, {}, Engine(Random(1), 4, 2)
    lookback = Lookback(model.addresser, model.cids_V, len(model.blocks))
    ids_N = new_slots(engine.slots, like=no_ids(), nothing=NOTHING)
    convs = {
        block: new_slots(engine.slots, 1, 32, like=torch.empty(0))
        for block in (1, 3)
        if model.blocks[block].memory.conv
    }

    def states(text: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([hidden.setdefault(text[: end + 1], torch.randn(1, 32)) for end in range(len(text))])

    for _ in range(40):
        served = engine.step()
        past_TP = history(served.ids_T, served.row, spec.max_order - 1, slots_N=ids_N, window_RW=served.window_RW)
        with lookback.begin(model.stores, served.ids_T[None], lookback_ids=past_TP[None], frozen=True) as step:
            for index in (1, 3):
                block, given = model.blocks[index], [(0,) if text is None else text for text in served.texts]
                state = PagedConv(served.row, convs[index], 9) if index in convs else None
                hidden_BTGD = torch.stack([states(text)[-1] for text in given])[:, None]
                with torch.no_grad():
                    flat_BTGD = block.memory(step.vectors(block.layer_id), hidden_BTGD, state=state)
                    for at, text in enumerate(served.texts):
                        if text is not None:
                            torch.testing.assert_close(flat_BTGD[at, 0], whole(model, index, text, states(text))[-1])


def whole(model: Transformer, index: int, text: tuple[int, ...], states_TGD: torch.Tensor) -> torch.Tensor:
    """The layer's update at every position of one text."""
    block = model.blocks[index]
    with model.begin(torch.tensor([text])) as step:
        return block.memory(step.vectors(block.layer_id), states_TGD[None])[0]


def test_windows_of_texts_are_the_ids_before_each_piece():
    texts_QN = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]], dtype=torch.int32)
    found = window_of(texts_QN, torch.tensor([2, 0, 1]), torch.tensor([3, 0, 2]), 2)
    assert found.tolist() == [[8, 7], [3, 2], [NOTHING, NOTHING]]


def test_what_cannot_be_known_is_refused():
    row = Engine(Random(0), 4, 2).step().row
    ids_T = torch.randint(0, VOCABULARY, row.positions_T.shape)
    with pytest.raises(ConfigError, match="nothing else knows what came before"):
        history(ids_T, row, 2)
    with pytest.raises(ConfigError, match="a flat row of"):
        FlatRow(row.positions_T, row.starts_R1, row.blocks_RK, row.slots_T[1:], 4)
    with pytest.raises(ConfigError, match="does not lie in blocks of 3"):
        FlatRow(row.positions_T, row.starts_R1, row.blocks_RK + 1, row.slots_T, 3).check()
    with pytest.raises(ConfigError, match="not offered in flat rows"):
        PagedConv(row, new_slots(9, 1, 1, like=torch.empty(0)), 3).extend(torch.zeros(1, 1, 1, 1), torch.ones(1, 1) > 0)
