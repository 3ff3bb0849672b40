"""Whatever a user names, as a model and a tokenizer of transformers: the one way in for evaluation and for the server.

    runs/demo-engram            a run of ours, read where it is; its hot rows come from its own training text
    folder of NengramForCausalLM   tables beside the weights, opened on any tier
    folder of qwen4_exp         n-gram tables left out of the load and read where they lie (`released.py`)
    any other folder            as transformers loads it
    + adapters                  memories of `nengram graft` and LoRAs of PEFT, put on in the order given

The tier changes speed and memory, never a vector. Code that comes with a checkpoint is never run.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nengram.address import AddressSpec
from nengram.config import TableOptions
from nengram.errors import CheckpointError, ConfigError, NengramError
from nengram.infer.hot import hot_sets, load_counts
from nengram.memory.checkpoint_files import CONFIG, read_json
from nengram.memory.layout import section_of
from nengram.model.folder import is_saved
from nengram.store import HotSet, Store
from nengram.study.reading import open_run

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nengram.hf.adapter import load_adapter
    from nengram.hf.auto import register
    from nengram.hf.export import export, from_run, tokenizer_of
    from nengram.hf.modeling import NengramForCausalLM
    from nengram.hf.released import load_with_table, stores_of
except ModuleNotFoundError as missing:
    raise ConfigError(f"{missing.name} is missing: pip install nengram[hf], transformers 5.16 or newer") from None

GRAFT, LORA = "adapter.json", "adapter_config.json"  # what an adapter's folder holds, by kind
QWEN = ("qwen4_exp", "qwen4_exp_text")
PLE = "ple_layer_ids"
ONLY_RUNS = ("stats", "stats_to", "record_rows")


@dataclass(frozen=True, eq=False)
class Opened:
    """A causal model in eval mode, the tokenizer it reads with, and what it is, in a word."""

    model: Any
    tokenizer: Any
    kind: str


@contextmanager
def opened(
    where: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    tables: TableOptions | None = None,
    device: str = "auto",
    dtype: str = "auto",
    console: Console | None = None,
) -> Iterator[Opened]:
    """Open a model; what it reads from is closed at the end.

    where: run folder or folder of transformers. adapters: folders. tables: as the command line's options; recording and
    statistics are a run's. device: "auto" is the accelerator if there is one. dtype: of the weights, never of tables.
    Raises: CheckpointError, ConfigError, StoreError, in one line that says what to pass.
    """
    where, options = Path(where), tables or TableOptions()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else _checked_device(device)
    register()
    is_run = (where / "config.toml").is_file() or is_saved(where / "final")
    how = {"device": device, "dtype": dtype}
    way = _a_run(where, options, console or Console(stderr=True), **how) if is_run else _a_folder(where, options, **how)
    with ExitStack() as closing:
        one = closing.enter_context(way)
        for number, folder in enumerate(adapters):
            for store in _put_on(one.model, Path(folder), f"adapter_{number}", options):
                closing.callback(store.close)
        yield Opened(one.model.eval(), one.tokenizer, one.kind)


@contextmanager
def _a_run(where: Path, options: TableOptions, console: Console, *, device: str, dtype: str) -> Iterator[Opened]:
    """On the CPU the run itself; on another device, or in another dtype, a copy of its weights that transformers places."""
    if (device, dtype) in (("cpu", "auto"), ("cpu", "float32")):
        with open_run(where, options, console) as reading:
            yield Opened(from_run(reading.run), tokenizer_of(reading.run), "run")
        return
    with tempfile.TemporaryDirectory(prefix="nengram-") as folder:
        export(where, folder)
        with _a_folder(Path(folder), options, device=device, dtype=dtype) as one:
            yield Opened(one.model, one.tokenizer, "run")


@contextmanager
def _a_folder(where: Path, options: TableOptions, *, device: str, dtype: str) -> Iterator[Opened]:
    config = _config_of(where)
    for name in ONLY_RUNS:
        if getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')} is told of run folders only, {where} is none")
    kind = config.get("model_type")
    given = {"device_map": device, "dtype": dtype, "local_files_only": True}
    inner = section_of(config, PLE)
    if kind == "nengram":
        hot = _hot_of(where, config, options)
        more = {"table_tier": options.table_tier, "table_hot": hot, "table_checked": options.verify_rows}
        model = _loaded(where, NengramForCausalLM.from_pretrained, **given, **more)
        stores = model.tables.stores
    elif kind in QWEN and inner.get(PLE):
        _simple_tier(options, "a released model")
        model = load_with_table(where, tier=options.table_tier, **given)
        stores = stores_of(model)
    else:
        model, stores = _loaded(where, AutoModelForCausalLM.from_pretrained, **given), {}
    try:
        yield Opened(model, _tokenizer(where), str(kind))
    finally:
        for store in stores.values():
            store.close()


def _put_on(model: Any, folder: Path, name: str, options: TableOptions) -> list[Store]:
    """A memory or a LoRA, by what lies in its folder, put into the model that is there; the stores it brought."""
    if (folder / GRAFT).is_file():
        _simple_tier(options, "an adapter")
        owner = load_adapter(model, folder, tier=options.table_tier, name=name)
        return list(owner.adapters[name].stores.values())
    if (folder / LORA).is_file():
        try:
            from peft import PeftModel
        except ModuleNotFoundError:
            raise ConfigError(f"{folder}: is a LoRA of PEFT: pip install peft") from None
        PeftModel.from_pretrained(model, folder)
        return []
    raise CheckpointError(f"{folder}: no adapter here (neither {GRAFT} nor {LORA} is in it)")


def _config_of(where: Path) -> dict[str, Any]:
    if (where / GRAFT).is_file() or (where / LORA).is_file():
        raise ConfigError(f"{where}: is an adapter: name the model it belongs to, and this folder with --adapter")
    if not (where / CONFIG).is_file():
        raise CheckpointError(f"{where}: neither a run (config.toml) nor a local folder of transformers ({CONFIG})")
    return read_json(where / CONFIG)


def _hot_of(where: Path, config: Mapping[str, Any], options: TableOptions) -> dict[int, HotSet] | None:
    if options.table_tier != "tiered":
        return None
    if not options.hot_from:
        raise ConfigError(
            f"{where}: tier tiered needs --hot-from, recorded rows: a folder does not say its training text"
        )
    spec = AddressSpec.from_json(json.dumps(config.get("address_spec")))
    return hot_sets(spec, load_counts(options.hot_from, spec), options.hot_share)


def _simple_tier(options: TableOptions, what: str) -> None:
    """Raise ConfigError for what only tables of our own models offer."""
    if options.table_tier == "tiered":
        raise ConfigError(f"tier tiered needs a hot set, which {what} has not: --table-tier mapped")
    if options.verify_rows:
        raise ConfigError(f"--verify-rows recomputes rows of runs and nengram folders, not of {what}")


def _loaded(where: Path, load: Any, **options: Any) -> Any:
    """The model; what transformers says of a folder it cannot load is cut to one line."""
    try:
        return load(where, **options)
    except NengramError:
        raise
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise CheckpointError(f"{where}: transformers cannot load it: {first_line(error)}") from error


def _tokenizer(where: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=True)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise CheckpointError(f"{where}: has no tokenizer that transformers can load: {first_line(error)}") from error


def _checked_device(device: str) -> str:
    with suppress(RuntimeError, AssertionError):  # the second where torch was built for the CPU alone
        if torch.empty(0, device=device).device.type == device.split(":")[0]:
            return device
    raise ConfigError(f'there is no device "{device}" here: --device cpu')


def first_line(error: BaseException) -> str:
    """What an error of another library says first."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
