"""engram-peft (checked with 1.2.7) as an implementation to ask; runs in whatever interpreter has it: `python engram_peft.py`.

Only its hashing and compression files are loaded, not the package, whose front imports trainers: numpy, torch, sympy and tokenizers
suffice. Its `engram_vocab_size_per_ngram` is the size of all heads of an order together, so the nominal size is multiplied by the
heads here; its indices begin at 0 in every slot, and its table adds the offsets, so they are added here too. Its hash remembers
nothing and knows no document starts and no blocked positions. Its Qwen mapping has the released model's numbers built in.
"""

import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

sys.path = [
    entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent
]  # this file's own name
PINNED = "engram-peft==1.2.7"


def part(name):
    """One file of the package as a module of its own."""
    home = importlib.machinery.PathFinder.find_spec("engram_peft")
    if home is None:
        raise ImportError("engram_peft is not installed")
    path = Path(home.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"engram_peft_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compression():
    """Its compression file; the two functions it takes from the package's utilities are not needed for a vocabulary in memory."""
    utilities = types.ModuleType("engram_peft.utils")
    utilities.safe_from_numpy = utilities.safe_tokenizer_from_pretrained = None
    sys.modules.setdefault("engram_peft", types.ModuleType("engram_peft"))
    sys.modules.setdefault("engram_peft.utils", utilities)
    return part("compression")


class Vocabulary:
    """A tokenizer of just these tokens."""

    def __init__(self, tokens):
        self.tokens, self.vocab_size = tokens, len(tokens)

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.tokens[i] for i in ids)

    def convert_ids_to_tokens(self, token_id):
        return self.tokens[token_id]


def mapping(setting):
    """Its hash for these sizes and seeds, or a sentence why there is none."""
    hashing, given, heads = part("hashing"), setting["parameters"], setting["heads"]
    orders = list(range(2, setting["max_order"] + 1))
    if setting["dialect"] == "qwen_ple":
        released = {"vocab_size": 248_320, "eos_id": 248_044, "rows_per_head": 20_000_000, "max_order": 3, "heads": 8}
        if len(given["ple_layer_ids"]) > 1 or given["seed"] != 1234 or any(given[k] != v for k, v in released.items()):
            return "its Qwen mapping has the released model's numbers built in"
        return hashing.QwenPleHashMapping(compressed_vocab_size=given["vocab_size"], layer_ids=[0])
    rows = given["rows_per_head"]
    rows = rows if isinstance(rows, list) else [rows] * len(orders)
    return hashing.NgramHashMapping(
        compressed_vocab_size=given["compressed_vocab_size"],
        engram_vocab_size_per_ngram=[one * heads for one in rows],
        ngram_sizes=orders,
        n_head_per_ngram=heads,
        layer_ids=list(given["layer_ids"]),
        pad_id=given["pad_cid"],
        seed=given["seed"],
    )


def numbers(setting, made):
    """Multipliers and primes; padding rows are the released table's, not the hash's."""
    if setting["dialect"] == "qwen_ple":
        return {"not_offered": "its Qwen multipliers are constants, and padding rows are not the hash's"}
    return {
        "layers": [
            {
                "layer_id": layer,
                "multipliers": [str(m) for m in made.all_multipliers[layer].tolist()],
                "moduli": made.prime_tables[layer],
                "num_rows": sum(map(sum, made.prime_tables[layer])),
            }
            for layer in made.layer_ids
        ]
    }


def rows(made, ids):
    """Row numbers of its table: index in the slot, and the sizes of the slots before."""
    import numpy as np

    found = {}
    for layer, indices in made.hash(np.array(ids)).items():
        sizes = np.concatenate([np.array(order) for order in made.prime_tables[layer]])
        found[str(layer)] = (indices + np.cumsum(sizes) - sizes).tolist()
    return {"rows": [found]}


def reply(question):
    """The answer to one question of the protocol."""
    if question["ask"] == "about":
        part("hashing")
        return {"name": "engram-peft", "version": importlib.metadata.version("engram-peft")}
    if question["ask"] == "classes":
        made = compression().CompressedTokenizer(tokenizer=Vocabulary(question["tokens"]))
        return {"classes": made.lookup.tolist()}
    setting = question["setting"]
    made = mapping(setting)
    if isinstance(made, str):
        return {"not_offered": made}
    if question["ask"] == "numbers":
        return numbers(setting, made)
    (call, *later) = question["calls"]
    if later:
        return {"not_offered": "its hash remembers nothing between calls"}
    for flag in ("starts", "blocked"):
        if flag in call:
            return {"not_offered": f"its hash takes no {flag}"}
    return rows(made, call["ids"])


def main():
    """Answer every line of standard input with a line of standard output."""
    for line in sys.stdin:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                answer = reply(json.loads(line))
        except ImportError as error:
            answer = {"missing": f"{error} for {sys.executable}; install it there: pip install {PINNED}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
