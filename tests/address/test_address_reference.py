"""The definition itself: what each position may see, and that it needs nothing but Python."""

import subprocess
import sys
from pathlib import Path

import pytest

import nengram.address
from nengram.address import reference

ROOT = Path(nengram.address.__file__).parents[2]
PAD = 0
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'numba')))"


def seen(cids, max_order=3, **barriers):
    flags = {name: [t in places for t in range(len(cids))] for name, places in barriers.items()}
    return reference.windows(cids, max_order=max_order, pad_cid=PAD, **flags)


def test_a_position_sees_itself_and_what_is_before_it():
    assert seen([1, 2, 3, 4]) == [[1, PAD, PAD], [2, 1, PAD], [3, 2, 1], [4, 3, 2]]


def test_a_start_sees_itself_and_nothing_before():
    assert seen([1, 2, 3, 4], starts={2}) == [[1, PAD, PAD], [2, 1, PAD], [3, PAD, PAD], [4, 3, PAD]]


def test_a_blocked_position_is_all_pad_and_nothing_looks_past_it():
    assert seen([1, -9, 3, 4, 5], blocked={1}) == [
        [1, PAD, PAD],
        [PAD, PAD, PAD],
        [3, PAD, PAD],
        [4, 3, PAD],
        [5, 4, 3],
    ]


def test_a_position_both_start_and_blocked_is_blocked():
    assert seen([1, 2, 3], starts={1}, blocked={1}) == [[1, PAD, PAD], [PAD, PAD, PAD], [3, PAD, PAD]]


def test_slots_are_order_major_and_the_first_multiplier_takes_the_current_id():
    assert reference.slot_ids([5, 3, 2], [7, 11, 13], [[10, 100], [1000]]) == [
        (35 ^ 33) % 10,
        (35 ^ 33) % 100,
        (35 ^ 33 ^ 26) % 1000,
    ]
    assert reference.slot_offsets([[10, 100], [1000]]) == [0, 10, 110]


@pytest.mark.parametrize("how", ["module", "file"])
def test_the_example_runs_without_torch_and_numpy(how):
    run = "runpy.run_module('nengram.address.reference', run_name='__main__')"
    if how == "file":
        run = f"runpy.run_path({str(Path(reference.__file__))!r}, run_name='__main__')"
    printed = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT}; import runpy; {run}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "4    744           (16, 744)    (2, 16, 744)      [76, 181, 277, 319]" in printed


def test_numpy_ids_are_hashed_without_torch_and_importing_needs_no_compiler():
    script = (
        "import sys; import nengram.address as a; from nengram.address import Addresser, AddressSpec\n"
        "heavy = {'numba', 'torch', 'matplotlib', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import numpy as np\n"
        "sizes = dict(compressed_vocab_size=9, rows_per_head=[5], heads=1)\n"
        "spec = AddressSpec.engram(**sizes, layer_ids=[0], pad_cid=0)\n"
        "assert Addresser(spec)(np.zeros((1, 2), int))[0].shape == (1, 2, 1)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_hashing_works_where_no_cache_folder_can_be_written():
    script = (
        "import numba.core.caching as caching; caching.CacheImpl._locator_classes = []\n"
        "import numpy as np; from nengram.address import Addresser, AddressSpec\n"
        "sizes = dict(compressed_vocab_size=9, rows_per_head=[5], heads=1)\n"
        "spec = AddressSpec.engram(**sizes, layer_ids=[0], pad_cid=0)\n"
        "assert Addresser(spec)(np.zeros((1, 2), int))[0].shape == (1, 2, 1)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_public_names_are_exactly_those_listed():
    listed = nengram.address.__all__
    assert sorted(listed) == sorted({name for names in nengram.address._FILES.values() for name in names})
    assert dir(nengram.address) == sorted(listed)
    assert all(getattr(nengram.address, name) is not None for name in listed)
    with pytest.raises(AttributeError, match="no attribute 'Adresser'"):
        _ = nengram.address.Adresser
