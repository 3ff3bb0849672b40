"""The state matrix: in every dialect and situation rows are identical and outputs equal, and docs/state.json says just that."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from nengram.address import StreamState
from nengram.memory import ConvState, Engram

SCRIPT = Path(__file__).parents[2] / "scripts" / "state.py"
spec = importlib.util.spec_from_file_location("state_matrix", SCRIPT)
state = sys.modules["state_matrix"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(state)

COMMITTED = json.loads(state.PLACE.read_text(encoding="utf-8"))
HEARS = [dialect for dialect in state.DIALECTS if dialect != "deepseek_v41"]  # has a convolution


@pytest.mark.parametrize("situation", state.SITUATIONS)
@pytest.mark.parametrize("dialect", state.DIALECTS)
def test_rows_are_identical_and_outputs_equal(dialect, situation):
    found = state.cell(dialect, situation)
    across = situation == "packed, the convolution not told" and dialect in HEARS
    assert (found["rows"], found["outputs"]) == ("identical", "differ" if across else "equal")
    assert found["positions"] > 0
    assert COMMITTED["cells"][situation][dialect] == found, "stale: python scripts/state.py"


def test_the_committed_matrix_is_whole():
    assert list(COMMITTED["cells"]) == list(state.SITUATIONS)
    assert all(list(cells) == list(state.DIALECTS) for cells in COMMITTED["cells"].values())
    assert COMMITTED["tolerance"] == state.TOLERANCE == 1e-12


@pytest.mark.parametrize("dialect", HEARS)
@pytest.mark.parametrize(
    ("situation", "kind", "method"),
    [("draft and rollback", ConvState, "restore"), ("beam reorder", ConvState, "reorder")],
)
def test_a_forgotten_convolution_is_seen(dialect, situation, kind, method, monkeypatch):
    monkeypatch.setattr(kind, method, lambda self, given: None)
    assert state.cell(dialect, situation) | {"positions": 0} == {
        "positions": 0,
        "rows": "identical",
        "outputs": "differ",
    }


@pytest.mark.parametrize("dialect", state.DIALECTS)
@pytest.mark.parametrize(("situation", "method"), [("draft and rollback", "restore"), ("beam reorder", "reorder")])
def test_forgotten_addresses_are_seen(dialect, situation, method, monkeypatch):
    right = getattr(StreamState, method)
    carries = "__call__"  # an addresser itself carries its state on by `restore`: that must go on working

    def forgetful(self, given):
        if method == "restore" and sys._getframe(1).f_code.co_name == carries:
            right(self, given)

    monkeypatch.setattr(StreamState, method, forgetful)
    assert state.cell(dialect, situation)["rows"] == "differ"


@pytest.mark.parametrize("dialect", state.DIALECTS)
def test_pads_that_are_not_blocked_are_seen(dialect, monkeypatch):
    right = state.Memory.__call__
    monkeypatch.setattr(
        state.Memory, "__call__", lambda self, given, **told: right(self, given, **told | {"blocked_BT": None})
    )
    found = state.cell(dialect, "left padding")
    assert (found["rows"], found["outputs"]) == ("differ", "differ")


@pytest.mark.parametrize("cuts", [[12], [5, 7], [1] * 12], ids=str)
@torch.no_grad()
def test_a_reset_convolution_hears_its_own_document_only(cuts):
    layer = Engram(6, 4, branches=2, kernel=3, dilation=2).double()
    torch.nn.init.normal_(layer.conv_weight)
    vecs, hidden = torch.randn(1, 12, 6).double(), torch.randn(1, 12, 2, 4).double()
    start_BT = torch.zeros(1, 12, dtype=torch.bool)
    start_BT[:, 3] = start_BT[:, 8] = True
    expected = torch.cat([layer(vecs[:, a:b], hidden[:, a:b]) for a, b in ((0, 3), (3, 8), (8, 12))], 1)
    conv, pieces = layer.new_state(1), []
    for chunk in torch.arange(12).split(cuts):
        pieces.append(layer(vecs[:, chunk], hidden[:, chunk], start_BT=start_BT[:, chunk], state=conv))
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-13)


def test_gradients_of_a_reset_convolution_are_the_slopes_and_without_starts_the_usual():
    layer = Engram(6, 4, branches=2, kernel=3, dilation=2).double()
    torch.nn.init.normal_(layer.conv_weight)
    vecs, hidden = torch.randn(1, 7, 6).double().requires_grad_(), torch.randn(1, 7, 2, 4).double().requires_grad_()
    start_BT = torch.zeros(1, 7, dtype=torch.bool)
    torch.testing.assert_close(layer(vecs, hidden, start_BT=start_BT), layer(vecs, hidden), rtol=0, atol=1e-14)
    start_BT[:, 3] = True
    assert torch.autograd.gradcheck(lambda *given: layer(*given, start_BT=start_BT), (vecs, hidden))
