"""How vLLM learns of our models: the function that stands under `vllm.general_plugins` among the package's entry points.

vLLM calls it once in each of its processes, before it reads a config. The class is named by a string, so that a process which serves
another model never imports it. `VLLM_PLUGINS=nengram` leaves other plug-ins out.
"""

from nengram.hf.auto import register as register_auto

ARCHITECTURE = "NengramForCausalLM"
CLASS = "nengram.hf.vllm_model:NengramForVllm"


def register() -> None:
    """Make folders that `nengram export` or `save_pretrained` wrote servable by vLLM. Twice is harmless."""
    from vllm import ModelRegistry

    register_auto()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, CLASS)
