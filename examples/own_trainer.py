"""An Engram layer in a trainer of your own: a small byte-level Transformer that takes three rooms of nengram and nothing else.

Four things are new against a plain trainer: addresses and tables are made once (1); the rows of a batch are known before its forward
pass (2); a layer adds what was looked up to the hidden state (3); tables, which are no parameters, learn after the backward pass (4).
"""

import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nengram.address import Addresser, AddressSpec, permuted
from nengram.memory import Engram, MemoryStep
from nengram.store import ResidentStore, RowwiseAdagrad

STEPS, BATCH, CONTEXT, WIDTH = 100, 8, 64, 64
ROWS, ROW_WIDTH = [1000, 4000, 8000], 8  # rows of one head, by order; numbers in a row
BLOCK = 1  # the block that reads the memory; the number also seeds its hash

torch.manual_seed(0)
lines = Path(__file__).parents[1].joinpath("data/bundled/wordnet.jsonl").read_text(encoding="utf-8").splitlines()
text = "\n".join(json.loads(line)["text"] for line in lines[:1000])
bytes_N = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
train_N, held_out_N = bytes_N[: -(CONTEXT + 1) * 128], bytes_N[-(CONTEXT + 1) * 128 :]

# 1. n-grams of 2, 3 and 4 bytes, each hashed by four heads into rows of their own; one table for the layer.
spec = AddressSpec.engram(compressed_vocab_size=256, rows_per_head=ROWS, heads=4, layer_ids=[BLOCK], pad_cid=0)
addresser = Addresser(spec)
stores = {BLOCK: ResidentStore(spec.num_rows(BLOCK), ROW_WIDTH)}
rule = RowwiseAdagrad()


class ByteModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, **options) for _ in range(2))
        self.memory = Engram(spec.slots * ROW_WIDTH, WIDTH, dilation=spec.max_order)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids_BT: torch.Tensor, step: MemoryStep) -> torch.Tensor:
        hidden_BTD = self.embed(ids_BT) + self.place.weight
        causal = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        for index, block in enumerate(self.blocks):
            if index == BLOCK:
                # 3. The layer serves several residual streams; here there is one, hence the axis of length one.
                hidden_BTD = hidden_BTD + self.memory(step.vectors(BLOCK), hidden_BTD.unsqueeze(2)).squeeze(2)
            hidden_BTD = block(hidden_BTD, src_mask=causal, is_causal=True)
        return self.head(hidden_BTD)


def loss_of(windows_BT: torch.Tensor, step: MemoryStep) -> torch.Tensor:
    return F.cross_entropy(model(windows_BT[:, :-1], step).flatten(0, 1), windows_BT[:, 1:].flatten())


model = ByteModel()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for number in range(STEPS):
    first_B = torch.randint(len(train_N) - CONTEXT, (BATCH,))
    windows_BT = train_N[first_B[:, None] + torch.arange(CONTEXT + 1)]
    with MemoryStep.begin(windows_BT[:, :-1], addresser, stores) as step:  # 2. from ids alone, before any float
        loss = loss_of(windows_BT, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step.update(rule, lr=0.05)  # 4. one gradient for each row that was read
    if number % 20 == 0 or number == STEPS - 1:
        print(f"step {number:3}  loss {loss.item():.3f} nats a byte")

windows_BT = held_out_N.view(-1, CONTEXT + 1)
for name, control in (("as trained", None), ("rows permuted", partial(permuted, seed=0))):
    with torch.no_grad(), MemoryStep.begin(windows_BT[:, :-1], addresser, stores, control=control) as step:
        print(f"held-out text, {name:13}  {loss_of(windows_BT, step).item():.3f} nats a byte")
