"""A run folder as a folder of transformers: the same numbers under the names that its tools open.

Weights become `model.safetensors`, every table keeps its format and its tier, the compression map goes with the weights, and the
tokenizer is written as transformers reads it: texts begin with the document separator, as they did in training, and end at it.
"""

import os
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nengram.config import as_dict
from nengram.errors import ConfigError
from nengram.hf.configuration import NengramConfig
from nengram.hf.modeling import NengramForCausalLM
from nengram.infer import LoadedRun, load_run


def export(run: str | os.PathLike, folder: str | os.PathLike, *, max_shard_size: str = "5GB") -> Path:
    """Write a finished run as a folder for `AutoModelForCausalLM` and `AutoTokenizer`; returns the folder.

    Raises: CheckpointError for a run that is not whole; ConfigError when `folder` is a run itself; OSError.
    """
    folder = Path(folder)
    if (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder}: holds a run, which an export would mix with; give another folder")
    loaded = load_run(run)
    from_run(loaded).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer_of(loaded).save_pretrained(folder)
    return folder


def from_run(run: LoadedRun) -> NengramForCausalLM:
    """A loaded run as a model of transformers, around the same modules and stores: nothing is copied."""
    model, doc_id = run.model, run.doc_id
    config = NengramConfig(
        backbone=as_dict(model.config),
        memory=as_dict(model.memory_config),
        address_spec=model.spec.to_json() if model.spec else None,
        compression={"digest": run.compression.digest, "tokenizer_digest": run.compression.tokenizer_digest},
        doc_token_id=doc_id,
        bos_token_id=doc_id,
        eos_token_id=doc_id,
        pad_token_id=model.memory_config.pad_id,
    )
    return NengramForCausalLM(config, model).eval()


def tokenizer_of(run: LoadedRun) -> PreTrainedTokenizerFast:
    """The run's tokenizer with the document separator before every text."""
    name = run.tokenizer.id_to_token
    doc, pad = name(run.doc_id), name(run.model.memory_config.pad_id)
    tokenizer = Tokenizer.from_str(run.tokenizer.to_str())
    tokenizer.post_processor = TemplateProcessing(
        single=f"{doc} $A", pair=f"{doc} $A {doc} $B", special_tokens=[(doc, run.doc_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=doc,
        eos_token=doc,
        pad_token=pad,
        padding_side="left",
        model_max_length=run.model.config.context,
    )
