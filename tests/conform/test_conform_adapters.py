"""The engram-peft adapter translates sizes, offsets and refusals: a stand-in package with a right hash behind its interface passes."""

import subprocess
import sys
from pathlib import Path

import pytest

from nengram.conform import Command, conform, load
from nengram.conform.runner import about

ADAPTER = Path(__file__).parents[2] / "conformance" / "adapters" / "engram_peft.py"
HASHING = """
import numpy as np
from nengram.address import AddressSpec, Addresser

class NgramHashMapping:
    def __init__(self, *, compressed_vocab_size, engram_vocab_size_per_ngram, ngram_sizes, n_head_per_ngram, layer_ids, pad_id, seed):
        assert ngram_sizes == list(range(2, 2 + len(ngram_sizes)))
        self.layer_ids = layer_ids
        self.spec = AddressSpec.engram(
            compressed_vocab_size=compressed_vocab_size,
            rows_per_head=[rows // n_head_per_ngram for rows in engram_vocab_size_per_ngram],
            heads=n_head_per_ngram, layer_ids=layer_ids, pad_cid=pad_id, seed=seed)
        self.all_multipliers = {id_: self.spec.multipliers(id_) for id_ in layer_ids}
        self.prime_tables = {id_: [list(heads) for heads in self.spec.layer(id_).moduli] for id_ in layer_ids}

    def hash(self, ids):
        blocked = ids < 0
        rows = Addresser(self.spec)(np.where(blocked, 0, ids))
        return {id_: rows[id_] - self.spec.offsets(id_) + WRONG for id_ in self.layer_ids}
"""
COMPRESSION = """
from engram_peft.utils import safe_from_numpy, safe_tokenizer_from_pretrained
from nengram.text.compress_reference import number_by_first_appearance, token_key
import numpy as np

class CompressedTokenizer:
    def __init__(self, tokenizer):
        texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        self.lookup = np.array(number_by_first_appearance([token_key(text, text) for text in texts]))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Installs a package of that name whose front cannot be imported, as if its trainers were missing."""

    def install(wrong: int = 0) -> Command:
        package = tmp_path / "engram_peft"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text("raise ImportError('no trainers here')")
        (package / "hashing.py").write_text(HASHING.replace("WRONG", str(wrong)))
        (package / "compression.py").write_text(COMPRESSION)
        about_it = tmp_path / "engram_peft-9.9.dist-info"
        about_it.mkdir(exist_ok=True)
        (about_it / "METADATA").write_text("Metadata-Version: 2.1\nName: engram-peft\nVersion: 9.9\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return Command([sys.executable, str(ADAPTER)])

    return install


def test_a_right_hash_behind_its_interface_passes_what_it_offers(stand_in):
    command = stand_in()
    assert about(command) == {"name": "engram-peft", "version": "9.9"}
    for dialect, refused in (("engram", 19), ("deepseek_v41", 19)):
        report = conform(command, load(dialect))
        wrong = [outcome for outcome in report.outcomes if outcome.status in ("differs", "no answer")]
        assert all(outcome.needs == ("negative_ids",) for outcome in wrong), wrong[0]
        assert report.count("not offered") == refused
    command.close()


def test_a_wrong_hash_behind_its_interface_does_not(stand_in):
    command = stand_in(wrong=1)
    report = conform(command, load("deepseek_v41"))
    command.close()
    assert report.count("passed", "rows") == 0 and report.count("differs", "rows") == 28


def test_without_the_package_it_says_what_is_missing(tmp_path):
    question = '{"ask": "about"}\n'
    done = subprocess.run(
        [sys.executable, "-S", "-I", str(ADAPTER)], input=question, capture_output=True, text=True, cwd=tmp_path
    )
    assert "engram_peft is not installed" in done.stdout and "pip install engram-peft==1.2.7" in done.stdout
