"""The look-back under vLLM's second model runner, which knows every request's whole text on the device.

The runner asks the model for the class of its state, and passes on whatever `prepare_inputs` gives as arguments of `forward`. So
ids before a piece come from the texts, prompt and answer alike, and no slot cache is needed for them.
"""

from typing import Any

import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from nengram.hf.lookback import NOTHING
from nengram.hf.vllm_history import window_of


class StateWithHistory(DefaultModelState):
    """vLLM's own state, and the ids before every piece as `lookback_token_ids`."""

    supports_prompt_embeds = False

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        depth = model.token_lookback_depth
        self.window_RW = torch.full((self.max_num_reqs, depth), NOTHING, dtype=torch.int32, device=device)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """As vLLM's, with the window of this batch."""
        inputs = super().prepare_inputs(input_batch, req_states)
        known = (req_states.all_token_ids.gpu, input_batch.idx_mapping.long(), req_states.num_computed_tokens.gpu)
        window_RP = window_of(*known, self.window_RW.shape[1])
        self.window_RW.fill_(NOTHING)
        self.window_RW[: len(window_RP)] = window_RP
        return inputs | {"lookback_token_ids": self.window_RW}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """As vLLM's, with a window that knows of nothing."""
        self.window_RW.fill_(NOTHING)
        return super().prepare_dummy_inputs(num_reqs, num_tokens) | {"lookback_token_ids": self.window_RW}
