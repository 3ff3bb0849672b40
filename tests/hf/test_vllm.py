"""A real vLLM engine writes exactly what our own model writes over whole texts: cut prompts, mixed batches, shared beginnings, drafts.

`make vllm` runs this in an environment of its own (environments/vllm); where vLLM is not installed it is skipped. Every engine takes
about a minute to start. The memory of the strong models is such that a lost look-back writes another text within a few tokens.
"""

import importlib.util
import os
import time
from types import SimpleNamespace as Of

import pytest
import torch

from nengram.errors import ConfigError
from tests.hf.strong import Strong

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make vllm", allow_module_level=True)
pytestmark = pytest.mark.vllm
TOKENS, SHARED, BLOCK = 24, 140, 32
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "block_size": BLOCK,
    "seed": 0,
    "disable_log_stats": False,
}
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "nengram",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module", autouse=True)
def settings():
    """The engine's processes read them from the environment."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in SETTINGS.items():
            patched.setenv(name, os.environ.get(name, value))
        yield


def prompts() -> list[list[int]]:
    """14 prompts of 1 to 180 ids, of which six begin with the same 140."""
    drawn = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(258, 400, (count,), generator=drawn).tolist()

    beginning = ids(SHARED)
    return [ids(count) for count in (1, 2, 3, 5, 24, 63, 120, 180)] + [beginning + ids(4 * n + 1) for n in range(6)]


def written(llm, texts: list[list[int]], tokens: int) -> tuple[list[list[int]], list[int]]:
    """What the engine writes greedily after each text, and how many ids of each it did not have to compute."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in texts], how, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in answers], [one.num_cached_tokens or 0 for one in answers]


def compared(
    name: str, strong: Strong, rounds: int, tokens: int = TOKENS, **options
) -> tuple[list[list[int]], dict[str, float]]:
    """Serve all prompts so many times; every token is the whole pass's, and not that of a lost look-back.

    Returns how many ids of each prompt were cached, by round, and the engine's counters.
    """
    from vllm import LLM

    texts, begun = prompts(), time.perf_counter()
    llm = LLM(model=str(strong.folder), **(ENGINE | options))
    ready, cached = time.perf_counter(), []
    right = [strong.right(ids, tokens) for ids in texts]
    for _ in range(rounds):
        found, hits = written(llm, texts, tokens)
        equal = sum(
            a == b for ours, theirs in zip(right, found, strict=True) for a, b in zip(ours, theirs, strict=True)
        )
        print(
            f"{name}: {equal} of {len(texts) * tokens} tokens equal, cached ids {hits}, {ready - begun:.0f} s to load"
        )
        assert found == right
        cached.append(hits)
    lost = [strong.lost(ids, tokens) for ids in texts]
    assert all(a != b for a, b in zip(lost, right, strict=True))
    return cached, {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def test_prompts_in_pieces_of_five(strong):
    compared("pieces of 5", strong, 1, max_num_batched_tokens=5, max_num_seqs=2)


def test_pieces_batches_and_shared_beginnings(any_strong, request):
    """Four sequences at a time, pieces of 24, twice over: the second time, and after the first of six, beginnings are cached."""
    cached, _ = compared(request.node.name, any_strong, 2, max_num_batched_tokens=24, max_num_seqs=4)
    whole_blocks = SHARED // BLOCK * BLOCK
    assert sum(hits >= whole_blocks for hits in cached[0][-6:]) >= 2 and min(cached[1][-6:]) >= whole_blocks


def test_rejected_drafts_are_written_anew(strong):
    """Drafts from the text itself, mostly wrong."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    _, counted = compared("drafts", strong, 1, max_num_batched_tokens=64, max_num_seqs=4, speculative_config=drafts)
    drafted, accepted = (counted[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    print(f"drafts: {accepted:.0f} of {drafted:.0f} accepted")
    assert drafted - accepted > 100


def test_tables_are_read_where_they_lie(strong):
    compared(
        "mapped", strong, 1, 8, max_num_batched_tokens=64, max_num_seqs=4, additional_config={"table_tier": "mapped"}
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"parallel_config.tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"parallel_config.pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"parallel_config.decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"parallel_config.use_ubatching": True}, "enable_dbo"),
        ({"quant_config": "fp8"}, "quantization"),
        ({"kv_transfer_config": "any"}, "kv_transfer_config"),
        ({"model_config.enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"compilation_config.cudagraph_mode": Of(name="PIECEWISE")}, "enforce_eager=True"),
    ],
)
def test_engines_that_would_be_wrong_are_refused(change, named):
    from nengram.hf.vllm_model import NengramForVllm

    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size")
    config = Of(
        parallel_config=Of(use_ubatching=False, **dict.fromkeys(sizes, 1)),
        compilation_config=Of(cudagraph_mode=None),
        model_config=Of(enable_prompt_embeds=False),
        quant_config=None,
        kv_transfer_config=None,
    )
    for place, value in change.items():
        owner, name = (
            (config, place) if "." not in place else (getattr(config, place.split(".")[0]), place.split(".")[1])
        )
        assert hasattr(owner, name)
        setattr(owner, name, value)
    with pytest.raises(ConfigError, match=named):
        NengramForVllm(vllm_config=config)


def test_the_second_runner_is_told_the_ids_before_each_piece():
    """Its state reads them from the texts; the runner itself needs Triton and is not run here."""
    from nengram.hf.vllm_model import NengramForVllm

    state = object.__new__(NengramForVllm.get_model_state_cls())
    state.rope_state = state.prompt_embeds_state = None
    state.supports_mm_inputs, state.window_RW = False, torch.full((4, 2), 9, dtype=torch.int32)
    texts = Of(gpu=torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.int32))
    requests = Of(all_token_ids=texts, num_computed_tokens=Of(gpu=torch.tensor([3, 0, 1], dtype=torch.int32)))
    batch = Of(idx_mapping=torch.tensor([2, 0], dtype=torch.int32))
    window = state.prepare_inputs(batch, requests)["lookback_token_ids"]
    assert window.tolist() == [[7, -1], [3, 2], [-1, -1], [-1, -1]]
    assert window.data_ptr() == state.prepare_dummy_inputs(2, 5)["lookback_token_ids"].data_ptr()
    assert window.tolist() == [[-1, -1]] * 4
