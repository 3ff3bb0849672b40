"""A small model whose memory decides what it says: whoever loses the look-back while generating writes another text at once.

Random weights, but rows as large as the hidden state and a convolution that is heard, so that within two to five greedy tokens a lost
look-back shows. `right` is the whole-pass argmax of our own model, without any cache: what every engine has to reproduce. `lost` is
what an engine writes that hashes each new token as if nothing came before it (the first token agrees: a look at one proves nothing).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from nengram.config import Config
from nengram.hf.export import from_run, tokenizer_of
from nengram.infer import LoadedRun
from nengram.model import Transformer
from nengram.text import CompressionMap, train_bpe
from tests.conftest import small_corpus

PROMPTS = (
    "Ada Turing went from Lake Geneva to the Black Sea in 1887.",
    "Kurt",
    "the Milky Way to Mount Ararat in 19",
    "Grace Hopper went from the Milky Way to Lake Geneva in 1961. Alan Noether went from Mount Ararat",
)
BACKBONE = {
    "vocab_size": 400,
    "width": 48,
    "blocks": 3,
    "heads": 4,
    "kv_heads": 2,
    "context": 256,
    "experts": 6,
    "expert_width": 16,
    "shared_width": 16,
}
MEMORY = {
    "kind": "engram",
    "blocks": [0, 2],
    "heads": 4,
    "row_width": 8,
    "rows_per_head": [1009, 1013],
    "table_std": 1.0,
}
VARIANTS = {
    "gqa": {},
    "mla": {"attention": "mla", "head_width": 12, "rope_width": 8, "kv_rank": 16, "streams": 2},
    "no convolution": {"memory__kernel": 0},
    "shared table": {"memory__shared_table": True},
}
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SAID = [{"role": "user", "content": "Where did Ada Turing go in 1887?"}]


@dataclass(frozen=True)
class Strong:
    """One such model: `own` is our Transformer, `folder` what `save_pretrained` made of it, with tokenizer and chat template."""

    own: Transformer
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    run: LoadedRun
    _written: dict = field(default_factory=dict)

    def ids(self, prompt: str) -> list[int]:
        """A prompt as the tokenizer gives it, the document separator first."""
        return self.tokenizer(prompt)["input_ids"]

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """[T, V] of the whole text."""
        return self.own(torch.tensor([ids]))[0]

    def right(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy continuation, every token by a pass over the whole text."""
        return self._greedy(ids, tokens, lost=False)

    def lost(self, ids: list[int], tokens: int) -> list[int]:
        """The same where every token made is hashed without what came before it."""
        return self._greedy(ids, tokens, lost=True)

    @torch.no_grad()
    def _greedy(self, ids: list[int], tokens: int, *, lost: bool) -> list[int]:
        made = self._written.setdefault((tuple(ids), lost), [])
        while len(made) < tokens:
            ids_BT = torch.tensor([ids + made])
            alone_BT = torch.arange(ids_BT.shape[1])[None] >= (len(ids) if lost else ids_BT.shape[1])
            made.append(int(self.own(ids_BT, start_BT=alone_BT)[0, -1].argmax()))
        return made[:tokens]


def build(folder: Path, variant: str = "gqa", seed: int = 0) -> Strong:
    """The model of a variant, saved into `folder`; another seed is another model with the same tokenizer and addresses."""
    bpe = train_bpe((entry.text for entry in small_corpus()), BACKBONE["vocab_size"])
    compression = CompressionMap.build(bpe)
    changes = VARIANTS[variant]
    memory = MEMORY | {
        key.removeprefix("memory__"): value for key, value in changes.items() if key.startswith("memory__")
    }
    backbone = BACKBONE | {key: value for key, value in changes.items() if not key.startswith("memory__")}
    keys = {f"model__{key}": value for key, value in backbone.items()} | {
        f"memory__{key}": value for key, value in memory.items()
    }
    config = Config().replace(**keys)
    own = Transformer(config.model, config.memory, cids_V=compression.cids_V)
    own.init_weights(seed)
    with torch.no_grad():
        own.embed.weight[:258] *= (
            0.05  # single bytes and the separator are not said: every text decodes, and none ends early
        )
    draws = torch.Generator().manual_seed(seed)
    for layer in (block.memory for block in own.memory_blocks() if block.memory.conv):
        torch.nn.init.normal_(layer.conv_weight, std=0.5, generator=draws)
    run = LoadedRun(own.eval(), bpe, compression, config, {})
    tokenizer = tokenizer_of(run)
    tokenizer.chat_template = CHAT
    from_run(run).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Strong(own, tokenizer, folder, run)
