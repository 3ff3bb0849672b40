"""Our classes where transformers and its tools look for them.

The Auto classes find a class by its config. `transformers serve` asks the `transformers` module itself for the name that stands under
`architectures` in config.json, and no flag of any tool imports a package; so a launcher calls `register`, then the tool's own main.
"""

import sys
from types import ModuleType

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, processing_utils

from nengram.hf.configuration import NengramConfig
from nengram.hf.modeling import NengramForCausalLM, NengramModel


def register() -> None:
    """Make our models loadable by `AutoModelForCausalLM.from_pretrained` and whatever is built on it. Twice is harmless."""
    AutoConfig.register(NengramConfig.model_type, NengramConfig, exist_ok=True)
    AutoModel.register(NengramConfig, NengramModel, exist_ok=True)
    AutoModelForCausalLM.register(NengramConfig, NengramForCausalLM, exist_ok=True)
    for kind in (NengramConfig, NengramModel, NengramForCausalLM):
        setattr(_transformers(), kind.__name__, kind)


def _transformers() -> ModuleType:
    """The module as it stays: importing `processing_utils`, which some part of it always does, puts a new one in its place."""
    return sys.modules[processing_utils.__package__]
