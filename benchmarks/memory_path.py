"""How much of a training step is memory? The demo's Engram arm, stepped with its memory layers and without them, by turns.

That difference is the honest figure, since it holds everything the layers bring along: hash, gather, gate, convolution, their share
of clipping and AdamW, the coalesced update of the table. The parts are then timed one by one as shares of the same step; their sum
need not be the difference, for a part alone finds warmer caches.
"""

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gates import check_engram, check_rows, check_update
from benchmarks.report import figure, result
from nengram.config import Config, load_config
from nengram.model import Transformer, resolve
from nengram.study.arm import prepare_for
from nengram.study.compare import arm_config
from nengram.study.share import clocked, first_batch, time_parts
from nengram.text import Prepared
from nengram.train import build_model
from nengram.train.loop import train_step
from nengram.train.optim import backbone_optimizer, row_optimizer


@dataclass(frozen=True)
class Sizes:
    """Which preset, and how often."""

    config: Config
    pairs: int = 24
    checked_tokens: int = 32  # the reference is a loop over positions


def run(sizes: Sizes | None = None) -> dict:
    """The result of this benchmark. Raises RedGate, and NengramError when the corpus cannot be read."""
    sizes = sizes or Sizes(load_config("demo"))
    data = prepare_for(sizes.config)
    config = resolve(arm_config(sizes.config, "engram", seed=0), data.tokenizer.get_vocab_size())
    model = build_model(config, data)
    model.init_weights(config.train.seed)
    verify(model, config, data, sizes.checked_tokens)
    spent_s = time_parts(model, config, data, sizes.pairs)
    whole_s = spent_s.pop("step")
    shares = paired_shares(model, config, data, sizes.pairs)
    figures = [figure("whole memory path / step", shares, "share", ("<=", 0.12))]
    figures += [figure(f"{part} / step", spent / whole_s, "share") for part, spent in spent_s.items()]
    tokens = config.train.batch * config.model.context
    absolute = {
        "step_ms": 1e3 * np.median(whole_s),
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / np.median(whole_s),
    }
    absolute |= {f"{part.replace(' + ', '_')}_us": 1e6 * np.median(spent) for part, spent in spent_s.items()}
    memory = config.memory
    what = (
        f"memory path of {sizes.config.name}'s Engram arm: width {config.model.width}, {config.model.blocks} blocks, memory in "
        f"{len(memory.blocks)} with {(memory.max_order - 1) * memory.heads} slots of {memory.row_width}, {config.train.table_rule}"
    )
    gate = (
        "rows equal the reference; the layer agrees with its loops; coalescing and update agree with their torch twins"
    )
    return result("memory_path", what, gate, figures, absolute)


def verify(model: Transformer, config: Config, data: Prepared, tokens: int) -> None:
    """The batch, layer and update that are about to be timed, each against its twin. Raises RedGate."""
    batch = first_batch(config, data)
    ids_BT, start_BT = torch.from_numpy(batch.ids_BT), torch.from_numpy(batch.start_BT)
    generator = torch.Generator().manual_seed(0)
    with model.begin(ids_BT, start_BT=start_BT) as step:
        rows = {layer_id: rows_BTS.numpy() for layer_id, rows_BTS in step.rows.items()}
        check_rows(rows, model.cids_V[ids_BT].numpy(), model.spec, batch.start_BT)
        for block in model.memory_blocks():
            vecs_BTM = step.vectors(block.layer_id)[:1, :tokens].flatten(2)
            hidden_BTGD = torch.randn(1, vecs_BTM.shape[1], 1, config.model.width, generator=generator)
            check_engram(block.memory, vecs_BTM, hidden_BTGD)
            rows_N = step.rows[block.layer_id].flatten()
            grads_NE = torch.randn(len(rows_N), config.memory.row_width, generator=generator)
            check_update(row_optimizer(config.train).rule, rows_N, grads_NE, model.stores[block.layer_id].num_rows)


def paired_shares(model: Transformer, config: Config, data: Prepared, pairs: int) -> np.ndarray:
    """1 - (step without memory) / (step with it), once per pair of steps; the first pair warms up and is left out."""
    memories, addresser = [block.memory for block in model.blocks], model.addresser
    adamw, rows = backbone_optimizer(model, config.train), row_optimizer(config.train)
    batch = first_batch(config, data)
    shares = []
    for _ in range(pairs + 1):
        spent_s = {False: 0.0, True: 0.0}
        for with_memory in (False, True):  # ends with the model whole
            for block, memory in zip(model.blocks, memories, strict=True):
                block.memory = memory if with_memory else None
            model.addresser = addresser if with_memory else None
            with clocked(spent_s, with_memory):
                train_step(model, batch, adamw, rows, config)
        shares.append(1 - spent_s[False] / spent_s[True])
    return np.array(shares[1:])
