"""One side of the benchmark `graft`, in a process of its own: the same small model with a memory by nengram, or by engram-peft.

    python benchmarks/graft_side.py nengram|engram-peft|none '{sizes}'     then a word a line on standard input, a JSON line back

    about      packages that the memory needs and their megabytes, the seconds of importing it
    train      one step: rows, forward, backward, optimiser; CPU seconds
    generate   greedy tokens from a short prompt; CPU seconds
    chunks     the largest difference between the logits of a text in one pass and in two with a cache

With "none" the model has no memory: what it costs alone. Nothing of this folder is imported, since engram-peft has an interpreter
of its own.
"""

import importlib.metadata as metadata
import json
import re
import sys
import time
import typing
from pathlib import Path

import torch
import typing_extensions
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


class Side:
    """A small random Llama with a memory before one block; `build` is what the two sides differ in."""

    def __init__(self, name: str, sizes: dict) -> None:
        self.name, self.sizes = name, sizes
        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["width"],
            intermediate_size=2 * sizes["width"],
            num_hidden_layers=sizes["blocks"],
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=0,
            eos_token_id=None,
        )
        began = time.process_time()
        self.model, self.optimizer = BUILD[name](LlamaForCausalLM(config), sizes)
        self.built_s = time.process_time() - began
        self.ids = torch.Generator().manual_seed(1)

    def random_ids(self, batch: int, length: int) -> torch.Tensor:
        return torch.randint(1, self.sizes["vocab_size"], (batch, length), generator=self.ids)

    def about(self) -> dict:
        names = needed({"nengram": "nengram[hf]", "engram-peft": "engram-peft"}[self.name])
        return {"packages": len(names), "megabytes": sum(megabytes(name) for name in names)}

    def train(self) -> dict:
        ids_BT = self.random_ids(self.sizes["batch"], self.sizes["context"])
        self.model.train()
        began = time.process_time()
        self.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"cpu_seconds": time.process_time() - began}

    def generate(self) -> dict:
        self.model.eval()
        prompt, made = self.random_ids(1, 16), self.sizes["generated"]
        began = time.process_time()
        with torch.no_grad():
            out = self.model.generate(input_ids=prompt, max_new_tokens=made, min_new_tokens=made, do_sample=False)
        spent = time.process_time() - began
        return {"cpu_seconds": spent, "tokens": out.shape[1] - 16}

    @torch.no_grad()
    def chunks(self) -> dict:
        self.model.eval()
        ids_BT = self.random_ids(1, 24)
        whole = self.model(input_ids=ids_BT, use_cache=False).logits
        cache = DynamicCache()
        parts = [
            self.model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids_BT.split(12, 1)
        ]
        return {"difference": float((torch.cat(parts, 1) - whole).abs().max()), "scale": float(whole.abs().max())}


def with_nengram(model, sizes: dict):
    """Also compressed ids, the paper's gate and convolution, one branch; tables by row-wise Adagrad, all else by AdamW."""
    from nengram.hf import graft, optimizers, train_memory

    graft(
        model,
        compress=False,
        blocks=(sizes["block"],),
        rows_per_head=(sizes["rows"],) * 2,
        heads=sizes["heads"],
        row_width=sizes["row_width"],
        table_std=0.02,
    )
    train_memory(model)
    return model, optimizers(model, lr=1e-3)[0]


def with_engram_peft(model, sizes: dict):
    """Its defaults, with one branch, raw ids and sparse gradients: its own optimiser, SparseAdam for the table."""
    typing.override = typing_extensions.override  # it asks Python 3.11 for what came with 3.12
    from engram_peft import EngramConfig, get_engram_model

    config = EngramConfig(
        engram_vocab_size_per_ngram=[sizes["rows"] * sizes["heads"]] * 2,  # of all heads together
        n_head_per_ngram=sizes["heads"],
        embedding_dim=2 * sizes["heads"] * sizes["row_width"],
        enable_tokenizer_compression=False,
        compressed_vocab_size=sizes["vocab_size"],
        target_layers=[sizes["block"]],
        hidden_size=sizes["width"],
        hc_mult=1,
        pad_id=0,
        gating_zero_init=False,
    )
    model = get_engram_model(model, config, train_mode="engram_only")
    return model, model.create_optimizer(base_learning_rate=1e-3)


def without(model, sizes: dict):
    """The model alone, its gradients reaching down to where the memory would be."""
    model.requires_grad_(False)
    norm = model.model.layers[sizes["block"]].input_layernorm.requires_grad_(True)
    return model, torch.optim.AdamW(norm.parameters(), lr=0.0)


BUILD = {"none": without, "nengram": with_nengram, "engram-peft": with_engram_peft}


def needed(requirement: str) -> set[str]:
    """Names of the distributions that a requirement brings, itself included, as far as they are installed."""
    found: set[str] = set()
    waiting = [requirement]
    while waiting:
        name, extras = _parsed(waiting.pop())
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name in found and not extras:
            continue
        found.add(name)
        for line in distribution.requires or ():
            wanted, _, marker = line.partition(";")
            extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
            if extra is None or extra.group(1) in extras:
                waiting.append(wanted)
    return found


def _parsed(requirement: str) -> tuple[str, set[str]]:
    name = re.match(r"\s*([A-Za-z0-9._-]+)", requirement).group(1).lower().replace("_", "-").replace(".", "-")
    extras = re.search(r"\[([^\]]*)\]", requirement)
    return name, {part.strip() for part in extras.group(1).split(",")} if extras else set()


def megabytes(name: str) -> float:
    """Bytes on disk of an installed distribution's files, compiled caches included, in MB."""
    distribution = metadata.distribution(name)
    paths = (Path(distribution.locate_file(file)) for file in distribution.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def main() -> None:
    side = Side(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps({"built_cpu_seconds": side.built_s}), flush=True)
    for line in sys.stdin:
        print(json.dumps(getattr(side, line.strip())()), flush=True)


if __name__ == "__main__":
    main()
