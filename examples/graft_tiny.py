"""Memory for a model that has none: graft it on, train it alone, save it, take it out, read it from disk.

A random model of bytes stands in for yours: `AutoModelForCausalLM.from_pretrained(folder)`, and `graft(model, folder, blocks=...)`
with the folder of its tokenizer.json in the place of `compress=False`.
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nengram.hf import graft, load_adapter, optimizers, save_adapter, train_memory

torch.manual_seed(0)
sizes = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1, bos_token_id=None, eos_token_id=None)).eval()
lines = Path(__file__).parents[1].joinpath("data/bundled/wordnet.jsonl").read_text(encoding="utf-8").splitlines()
text = " ".join(json.loads(line)["text"] for line in lines[:300]).encode()
ids_NT = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[: 60 * 8 * 64].view(60, 8, 64)  # its ids are bytes

before = model(ids_NT[0]).logits
memory = graft(model, compress=False, blocks=(1,), rows_per_head=(1000, 4000, 8000), heads=4, row_width=8)
print(f"grafted: the same logits, bit for bit: {torch.equal(model(ids_NT[0]).logits, before)}")

train_memory(model)  # the model itself stays as it is
optimizer, schedule = optimizers(model, lr=1e-2, table_lr=0.3, steps=len(ids_NT))
for step, ids_BT in enumerate(ids_NT):
    loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    model.zero_grad()
    if step in (0, len(ids_NT) - 1):
        print(f"step {step + 1:2}  {loss:.3f} nats a byte")

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    save_adapter(model, f"{folder}/memory")
    memory.remove()
    print(f"taken out: the model it was: {torch.equal(model(ids_NT[0]).logits, before)}")
    load_adapter(model, f"{folder}/memory", tier="mapped")
    print(f"from disk  {model(input_ids=ids_NT[-1], labels=ids_NT[-1]).loss:.3f} nats a byte")
