"""An Engram layer can be lifted into anyone's trainer: address, store and memory, and no other room."""

import subprocess
import sys

OWN_TRAINER = """
import sys
import torch
from nengram.address import Addresser, AddressSpec
from nengram.memory import Engram, MemoryStep
from nengram.store import ResidentStore, SparseAdam

heavy = {"numba", "transformers", "matplotlib", "tokenizers"} & set(sys.modules)
assert not heavy, f"imported at import time: {heavy}"

torch.manual_seed(0)
sizes = {"rows_per_head": [101, 103], "heads": 2, "layer_ids": [1]}
spec = AddressSpec.engram(compressed_vocab_size=64, pad_cid=0, **sizes)
stores = {1: ResidentStore(spec.num_rows(1), 4)}
layer = Engram(spec.slots * 4, 16)
head = torch.nn.Linear(16, 64)
optimizer = torch.optim.AdamW([*layer.parameters(), *head.parameters()], lr=3e-3)
addresser, ids_BT = Addresser(spec), torch.randint(0, 64, (4, 33))
losses = []
for _ in range(60):
    with MemoryStep.begin(ids_BT[:, :-1], addresser, stores) as step:
        hidden = torch.ones(4, 32, 1, 16)
        hidden = hidden + layer(step.vectors(1), hidden)
        loss = torch.nn.functional.cross_entropy(head(hidden[:, :, 0]).flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step.update(SparseAdam(), 3e-2)
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses[:: len(losses) - 1]

rooms = {name.split(".")[1] for name in sys.modules if name.startswith("nengram.")}
assert rooms <= {"address", "store", "memory", "errors", "files", "config", "shapes"}, rooms
assert not {"transformers", "matplotlib", "tokenizers"} & set(sys.modules)
"""


def test_own_trainer_learns_with_three_rooms_and_nothing_else():
    done = subprocess.run([sys.executable, "-c", OWN_TRAINER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
