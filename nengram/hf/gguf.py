"""A GGUF file into the folder that everything else in transformers reads: float32 safetensors, a config, a tokenizer.

Small models are handed out as GGUF, and transformers opens one, but what it opens stays marked as quantised: it cannot be saved, is
unpacked anew at every load (27 s for 135 M parameters, against 1), and needs two more packages each time. So it is converted once. The
weights are the quantised ones, spelled out in float32: nothing is lost and nothing is regained.
"""

import os
from pathlib import Path

from nengram.errors import CheckpointError, ConfigError, DataError
from nengram.files import held, sha256_file
from nengram.model.folder import is_saved, open_folder, sealed

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(folder: str | os.PathLike = "data/smollm2") -> Path:
    """The folder of SmolLM2-135M for `from_pretrained`, converted at the first call; `nengram data fetch smollm2` gets the file.

    Raises: DataError when the file is not there, and as `convert_gguf` does.
    """
    path = Path(folder) / SMOLLM2
    if not path.is_file():
        raise DataError(f"{path}: not there; `nengram data fetch smollm2` fetches it (93 MB)")
    return convert_gguf(path, Path(folder) / "model")


def convert_gguf(gguf: str | os.PathLike, into: str | os.PathLike) -> Path:
    """Write the causal language model of a GGUF file into a folder, whole or not at all; a folder made of the same bytes is kept.

    Raises: DataError for a file that is no GGUF model that transformers knows, ConfigError when its packages are missing,
        CheckpointError when the folder there is damaged or holds something else.
    """
    gguf, into = Path(gguf), Path(into)
    facts = {"gguf": gguf.name, "gguf_sha256": _digest(gguf)}
    with held(into.parent):
        if is_saved(into):
            if open_folder(into).get("gguf_sha256") != facts["gguf_sha256"]:
                raise CheckpointError(
                    f"{into}: holds another model than {gguf.name}; remove it, or choose another folder"
                )
            return into
        with sealed(into, facts) as beside:
            _write(gguf, beside)
    return into


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _write(path: Path, folder: Path) -> None:
    try:
        import accelerate  # noqa: F401 - transformers needs both, and its own messages ask for other packages
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as missing:
        raise ConfigError(f"{missing.name} is missing: pip install transformers accelerate gguf") from None
    here = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **here)
        packed = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **here)
    except (OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{path}: not a GGUF model that transformers can read ({why})") from error
    config = type(packed.config).from_dict(
        {
            name: value
            for name, value in packed.config.to_dict().items()
            if name not in ("quantization_config", "_name_or_path")
        }
    )
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(packed.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = packed.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
