"""transformers' own `qwen4_exp` as an implementation to ask: its n-gram embedding, its buffers, its decoding cache.

The module adds rows to an embedding of up to 320 million of them. Only its row numbers are wanted, so while it is built the embedding
is replaced by one that gives back the row numbers it is asked for; everything else is the library's unchanged code. Ids are raw, and
only an end of text is a barrier there: document starts and blocked positions are not offered.
"""

import json
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import nn

from nengram.errors import ConfigError

try:
    import transformers
    from transformers import DynamicCache
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding
except ModuleNotFoundError as missing:
    raise ConfigError(f"{missing.name} is missing: pip install nengram[hf], transformers 5.16 or newer") from None


class _RowNumbers(nn.Module):
    """In place of an embedding: answers every row number with itself, as a vector of one."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.weight = torch.zeros(0)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unsqueeze(-1)


def reply(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to any question of the conformance protocol."""
    if question["ask"] == "about":
        return {"name": "transformers", "version": transformers.__version__}
    if question["ask"] == "classes":
        return {"not_offered": "qwen4_exp does not compress ids"}
    setting = question["setting"]
    if setting["dialect"] != "qwen_ple":
        return {"not_offered": f"transformers has no {setting['dialect']}"}
    config, layers = _model(json.dumps(setting["parameters"]))
    if question["ask"] == "numbers":
        return {"layers": [_numbers(place, layer) for place, layer in enumerate(layers)]}
    for flag in ("starts", "blocked"):
        if any(flag in call for call in question["calls"]):
            return {"not_offered": f"qwen4_exp takes no {flag}"}
    return {"rows": _rows(config, layers, [call["ids"] for call in question["calls"]])}


@lru_cache(maxsize=4)
def _model(parameters: str) -> tuple[Qwen4ExpTextConfig, list[Qwen4ExpTextNGramEmbedding]]:
    given = json.loads(parameters)
    blocks = given["ple_layer_ids"]
    slots = (given["max_order"] - 1) * given["heads"]
    config = Qwen4ExpTextConfig(
        vocab_size=given["vocab_size"],
        eos_token_id=given["eos_id"],
        ple_layer_ids=blocks,
        ngram_vocab_size_base=given["rows_per_head"],
        ngram_size=given["max_order"],
        heads_per_ngram=given["heads"],
        make_ngram_vocab_size_divisible_by=given["divisible_by"],
        seed=given["seed"],
        ple_embed_dim=slots,
        hidden_size=slots,
        num_hidden_layers=max(blocks),
        layer_types=["linear_attention"] * max(blocks),
    )
    with mock.patch.object(nn, "Embedding", _RowNumbers):
        return config, [
            Qwen4ExpTextNGramEmbedding(config, slots, block - 1, place) for place, block in enumerate(blocks)
        ]


def _numbers(place: int, layer: Qwen4ExpTextNGramEmbedding) -> dict[str, Any]:
    moduli = layer.ngram_heads_vocab_sizes.reshape(-1, layer.heads_per_ngram)
    return {
        "layer_id": place,
        "multipliers": [str(multiplier) for multiplier in layer.layer_multipliers.tolist()],
        "moduli": moduli.tolist(),
        "num_rows": layer.ngram_embedding.num_rows,
    }


def _rows(config: Qwen4ExpTextConfig, layers: list[Qwen4ExpTextNGramEmbedding], calls: list) -> list[dict[str, list]]:
    cache = DynamicCache(config=config) if len(calls) > 1 else None
    return [
        {str(place): layer(torch.tensor(ids), cache).tolist() for place, layer in enumerate(layers)} for ids in calls
    ]
