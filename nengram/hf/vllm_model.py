"""Our model as vLLM's engine runs it: the same modules and tables, attention on its paged cache, the past by its slots.

    ids, positions, metadata ─▶ FlatRow ─▶ history ─▶ Lookback.begin ─▶ MemoryStep ─▶ Transformer.hidden ─▶ logits

A row holds tokens of many requests, so every token goes through the blocks as a sequence of its own, and what comes before it is
looked up (`nengram.hf.vllm_history`). Weights and tables are opened as everywhere else; `--additional-config '{"table_tier":
"mapped"}'` leaves tables where they lie. What would be served wrong, or cannot be served, is refused when the engine starts.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from nengram.errors import CheckpointError, ConfigError
from nengram.hf.modeling import BlockPast, NengramForCausalLM, Past
from nengram.hf.vllm_attention import PAGED
from nengram.hf.vllm_history import NOTHING, FlatRow, PagedConv, history, new_slots
from nengram.memory import MemoryStep
from nengram.model.attention import View
from nengram.model.memories import row_control


class NengramForVllm(nn.Module):
    """ids of a flat row in, hidden states out; vLLM makes it, and asks `compute_logits` for those that it samples from.

    Raises: ConfigError for engine options that would be served wrong; CheckpointError as `NengramForCausalLM.from_pretrained`.
    """

    allow_patterns_overrides = ["model*.safetensors"]  # tables are no weights to read through

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        _refuse(vllm_config)
        loaded = _open(vllm_config)
        self.weights = dict(loaded.state_dict(keep_vars=True))  # by the names that they are saved under
        self.lookback, self.stack = loaded.model.lookback, loaded.model.stack
        for index, block in enumerate(self.stack.blocks):
            paged = PAGED[type(block.attention)]
            block.attention = paged(block.attention, vllm_config, f"{prefix}blocks.{index}.attention")
        self.knows_texts = vllm_config.use_v2_model_runner
        self.cache: Callable[[], Tensor | None] = lambda: None  # the one that the slots below belong to
        self.slots_N: Tensor | None = None
        self.conv_slots: dict[int, Tensor] = {}

    @property
    def token_lookback_depth(self) -> int:
        """How many ids before each piece the runner is to pass as `lookback_token_ids`."""
        return 0 if self.lookback is None else self.lookback.addresser.spec.max_order - 1

    @staticmethod
    def get_model_state_cls() -> type:
        """What the second runner keeps of requests."""
        from nengram.hf.vllm_state import StateWithHistory

        return StateWithHistory

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, D]; of no use for rows of a memory."""
        return self.stack.embed(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        lookback_token_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, D] of ids [T]. Raises: ConfigError for embeddings, and for a cache whose layout is not known."""
        if input_ids is None or inputs_embeds is not None:
            raise ConfigError("memory needs token ids: embeddings have no addresses")
        ids_T, row = input_ids.long(), self._row(positions)
        step = self._begin(ids_T, row, lookback_token_ids)
        try:
            past, view = self._past(ids_T, row), View(positions[:, None])
            return self.stack.hidden(ids_T[:, None], step=step, cache=past, view=view)[:, 0]
        finally:
            if step is not None:
                step.release()

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[n, D] -> [n, V]: the head is the embedding."""
        return hidden_states @ self.stack.embed.weight.T

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take weights by the names of model.safetensors. Raises: CheckpointError for one that this model has not."""
        for name, tensor in weights:
            if name not in self.weights or self.weights[name].shape != tensor.shape:
                raise CheckpointError(f"{name} {list(tensor.shape)}: no such weight in this model")
            self.weights[name].data.copy_(tensor)

    def _row(self, positions_T: Tensor) -> FlatRow | None:
        """Where the tokens stand; None while the engine only measures memory, and has no cache yet."""
        first = self.stack.blocks[0].attention.paged.attend
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, list):
            raise ConfigError("microbatches do not say what came before a piece: enable_dbo=False")
        if not metadata or not first.kv_cache.numel():
            return None
        told = metadata[first.layer_name]
        missing = [name for name in ("query_start_loc", "block_table", "slot_mapping") if not hasattr(told, name)]
        if missing:
            raise ConfigError(
                f"attention by {first.attn_backend.get_name()} does not tell {missing[0]}: choose FLASH_ATTN"
            )
        slots_T = torch.full_like(positions_T, NOTHING)
        given = min(len(slots_T), len(told.slot_mapping))
        slots_T[:given] = told.slot_mapping[:given]
        row = FlatRow(positions_T, told.query_start_loc, told.block_table, slots_T, first.kv_cache.shape[2])
        self._bind(first.kv_cache, row)
        return row

    def _bind(self, cache: Tensor, row: FlatRow) -> None:
        """A slot of ours for every slot of the cache; anew whenever the engine has a new cache."""
        if self.cache() is cache:
            return
        row.check()
        self.cache, number = weakref.ref(cache), cache.shape[0] * cache.shape[2]
        ids = torch.empty(0, dtype=torch.int32, device=cache.device)
        self.slots_N = None if self.knows_texts else new_slots(number, like=ids, nothing=NOTHING)
        self.conv_slots = {
            index: new_slots(number, memory.branches, memory.width, like=memory.conv_weight)
            for index, memory in self._convolving().items()
        }

    def _convolving(self) -> dict[int, nn.Module]:
        memories = {index: block.memory for index, block in enumerate(self.stack.blocks)}
        return {index: memory for index, memory in memories.items() if getattr(memory, "conv", False)}

    def _begin(self, ids_T: Tensor, row: FlatRow | None, window_RW: Tensor | None) -> MemoryStep | None:
        if self.lookback is None:
            return None
        if row is None:
            before_TP = ids_T.new_full((len(ids_T), self.token_lookback_depth), NOTHING)
        else:
            before_TP = history(ids_T, row, self.token_lookback_depth, slots_N=self.slots_N, window_RW=window_RW)
        control = row_control(self.stack.memory_config.control)
        options = {"lookback_ids": before_TP[None], "control": control, "frozen": True}
        return self.lookback.begin(self.stack.stores, ids_T[None], **options)

    def _past(self, ids_T: Tensor, row: FlatRow | None) -> Past:
        convs = {
            index: memory.new_state(len(ids_T))
            if row is None
            else PagedConv(row, self.conv_slots[index], (memory.kernel - 1) * memory.dilation)
            for index, memory in self._convolving().items()
        }
        return Past([BlockPast(None, convs.get(index)) for index in range(len(self.stack.blocks))])


def _open(config: VllmConfig) -> NengramForCausalLM:
    model, options = config.model_config, {}
    if config.load_config.download_dir:
        options["cache_dir"] = config.load_config.download_dir
    tier = dict(config.additional_config or {}).get("table_tier", "resident")
    return NengramForCausalLM.from_pretrained(
        model.model, revision=model.revision or "main", dtype=model.dtype, table_tier=tier, **options
    ).eval()


def _refuse(config: VllmConfig) -> None:
    """Raise ConfigError, one clear line, for what the engine was asked for and this model cannot do."""
    parallel, graphs = config.parallel_config, config.compilation_config.cudagraph_mode
    unserved = {
        "tensor_parallel_size > 1": parallel.tensor_parallel_size > 1,
        "pipeline_parallel_size > 1": parallel.pipeline_parallel_size > 1,
        "decode_context_parallel_size > 1": parallel.decode_context_parallel_size > 1,
        "microbatches (enable_dbo)": parallel.use_ubatching,
        "quantization of weights": config.quant_config is not None,
        "kv_transfer_config (a memory's past is not among the keys)": config.kv_transfer_config is not None,
        "enable_prompt_embeds (embeddings have no addresses)": config.model_config.enable_prompt_embeds,
        "CUDA graphs (rows are hashed outside of them; enforce_eager=True)": bool(graphs) and graphs.name != "NONE",
    }
    for what, asked in unserved.items():
        if asked:
            raise ConfigError(f"nengram models are not served under {what}")
