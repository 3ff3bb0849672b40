"""Every knob on one page, and the only place where a preset, an override or a saved run becomes a Config.

A Config is frozen: nothing changes it after it was read, so the file saved beside a run is the run. Unknown sections and keys
are refused with the nearest match; presets (`configs/*.toml`) are data and hold only what differs from the defaults below.

    defaults  <-  preset or run TOML  <-  dotted overrides (`train.lr=0.004`)  =  Config  ->  config.toml of the run

With `[budget] scale` set, `[model]` and `[memory]` sizes are not written by hand: `nengram.model.budget.resolve` derives them from
the two dials (scale, rho) so that every arm of a comparison has the same parameters and FLOPs. This page imports no torch.
"""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nengram.errors import ConfigError, nearest

ARMS = ("moe", "engram", "one_row", "misaligned", "frozen", "additive", "no_table", "wide_shared")
TABLE_TIERS = ("resident", "host", "mapped", "tiered")


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it is cut into tokens."""

    corpus: str = "bundled"  # "bundled", "facts" (after `nengram data fetch facts`), or a .txt/.jsonl file or folder
    vocab_size: int = 4096  # size of the byte-level BPE trained on the train split; ignored when `tokenizer` is given
    tokenizer: str = ""  # path of any tokenizer.json; empty: train one
    doc_token: str = ""  # the token that separates documents, where a foreign tokenizer's own cannot be guessed
    cache: str = "runs/cache"  # encoded corpora, keyed by content


@dataclass(frozen=True)
class BudgetConfig:
    """Two dials. scale 0: `[model]` and `[memory]` are taken as written."""

    scale: int = 0  # blocks; width is 32 x scale
    rho: float = 0.6  # share of the sparse budget that goes to experts; 1 = pure MoE
    arm: str = "engram"  # one of ARMS
    target_total: int = 0  # parameters to end at, vocabulary left out; 0: those of pure MoE with the same backbone
    target_flops: int = 0  # forward FLOPs a token to end at; 0: likewise


@dataclass(frozen=True)
class ModelConfig:
    """The backbone: a pre-norm decoder with DeepSeek-style MoE; the defaults are grouped-query attention and a plain residual."""

    vocab_size: int = 0  # 0: the tokenizer's
    width: int = 128  # D
    blocks: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 128  # T in training
    experts: int = 32  # X, routed
    experts_per_token: int = 2  # K
    expert_width: int = 64
    shared_width: int = 64  # the shared expert; the dial that pays for the memory path
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    balance_rate: float = 0.01  # step of the loss-free balancing bias, per optimiser step
    attention: str = "gqa"  # "gqa", or "mla": multi-head latent attention, which leaves `kv_heads` unread
    head_width: int = 0  # mla: of the content part of a head; 0: width / heads
    rope_width: int = 0  # mla: of the rotated part of a head, even
    kv_rank: int = 0  # mla: of the latent that all heads' keys and values are made from
    query_rank: int = 0  # mla: of the latent that queries are made from; 0: from the hidden state
    streams: int = 1  # G, residual streams joined by manifold-constrained hyper-connections; 1: a plain residual
    dense_blocks: int = 0  # the first so many blocks have a SwiGLU in the place of experts
    dense_width: int = 0  # its inner width
    routed_scale: float = 1.0  # the weights of a token's routed experts sum to this
    rope_scale: float = 1.0  # YaRN: how many times longer than `rope_original_context` texts become; 1: off
    rope_original_context: int = 0  # positions that the model was trained on before
    rope_alpha: float = (
        1.0  # rotary pairs that turn less often than this in the original context are slowed by `rope_scale`
    )
    rope_beta: float = 32.0  # those that turn more often than this stay as they are
    rope_mscale: float = 1.0  # scores are multiplied by (0.1 x this x ln(rope_scale) + 1) squared


@dataclass(frozen=True)
class MemoryConfig:
    """The memory layers. Sizes per layer; every layer has its own table."""

    kind: str = "none"  # "engram", "additive", "none"
    dialect: str = "engram"  # one of nengram.address.DIALECTS: how rows are addressed, and the form of the layer
    control: str = "hashed"  # "hashed", "one_row", "misaligned": what the rows of the training run are
    blocks: tuple[int, ...] = (
        1,
    )  # zero-based, memory comes before the block's attention; also the layer_id of the hash
    max_order: int = 3  # n-gram orders 2..max_order
    heads: int = 8  # hash heads per order
    row_width: int = 4  # E
    rows_per_head: tuple[int, ...] = (18000, 18000)  # nominal, one per order; each head takes the next unused prime
    kernel: int = 4  # of the short convolution; 0: none ("deepseek_v41" has none)
    compress: bool = True  # hash compressed ids (False: raw ids, as "qwen_ple" must)
    compressed_vocab_size: int = 0  # 0: what the tokenizer gives
    pad_id: int = (
        0  # raw id that stands before a start (our BPE's <|pad|> is 0, DeepSeek's is 2); "qwen_ple": end of text
    )
    table_std: float = 0.02  # N(0, 1) turned a gain into a loss at small scale
    frozen: bool = False  # rows stay as they were drawn: a random feature of the n-gram, nothing learned
    frozen_std: float = 0.5  # of the arm `frozen`, in the place of table_std: about where trained rows end up
    gate: str = "sign"  # one of nengram.memory.GATES: "sign", "copysign", "plain" (no root), "open" (no gate)
    shared_table: bool = False  # all memory layers read the rows of the first, from one table
    seed: int = 0  # of the hash
    codec: str = "fp32"  # how a row is stored, one of nengram.store.CODECS; a model is built with "fp32"


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. Tables have their own rule, rate and clipping, and no weight decay."""

    tokens: int = 0  # 0: one pass over the train split
    batch: int = 8  # sequences per step
    optimizer: str = "adamw"  # of the backbone: "adamw", or the paper's "muon" for matrices and AdamW for the rest
    lr: float = 0.006
    table_lr_multiplier: float = 5.0
    table_rule: str = "sparse_adam"
    table_clip: float = 0.0  # norm limit of one table's gradient; 0: none
    weight_decay: float = 0.1  # matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8  # of AdamW and of the tables' sparse Adam
    clip: float = 1.0  # norm limit of the backbone's gradient
    schedule: str = "cosine"  # after the warm-up; or the paper's "step": x0.316 from 80 % of the steps, x0.1 from 90 %
    warmup_steps: int = 40
    final_lr_share: float = 0.1  # the cosine ends at this share of lr
    device: str = "cpu"  # where the model and its tables live, e.g. "cuda"; only the CPU has been tried
    table_tier: str = (
        "resident"  # one of TABLE_TIERS; "mapped" and "tiered" train resident and are read from disk afterwards
    )
    seed: int = 0  # of the weights and of the order of the documents
    eval_every: int = 0  # steps between looks at dev; 0: at the end only
    eval_tokens: int = 32768  # of dev, per look, evenly spread
    test_tokens: int = 0  # of test, judged once at the end, evenly spread; 0: all of it
    meter_every: int = 0  # steps between looks at dev with permuted rows: what the lookup itself contributes; 0: never
    second_pass: str = (
        "keep"  # what protects a further pass over the text: "keep" (nothing), "fresh_tables", "mask_rare"
    )
    rare_below: int = 2  # "mask_rare": n-grams met less often than this in one pass are not read
    checkpoint_every: int = 100  # steps
    log_every: int = 10  # steps


@dataclass(frozen=True)
class CompareConfig:
    """The head-to-head. `lr` holds the tuned learning rate of each arm; `tune` searches them."""

    arms: tuple[str, ...] = ("moe", "engram", "one_row", "additive", "no_table")
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: dict[str, float] = field(default_factory=dict)
    tuned_by: str = ""  # the command that found `lr`, and what it found
    reference: str = ""  # a committed results.json of the same preset, printed beside a quicker run


@dataclass(frozen=True)
class RateConfig:
    """A learning rate found on dev, for one arm at one share and budget."""

    arm: str = "engram"
    rho: float = 0.6
    tokens: int = 0  # 0: whatever the training budget
    lr: float = 0.006


@dataclass(frozen=True)
class SweepConfig:
    """A study over any keys. A grid is the product of its keys' values; every grid is run with every seed."""

    grids: tuple[dict[str, list], ...] = ()  # e.g. {"budget.rho" = [1.0, 0.6], "train.tokens" = [409600]}
    seeds: tuple[int, ...] = (0, 1, 2)
    repeat: bool = False  # points may read the text more than once
    rates: tuple[RateConfig, ...] = ()  # `train.lr` between two shares is interpolated on a log scale
    tuned_by: str = ""  # the command that found `rates`, and what it found


@dataclass(frozen=True)
class TableOptions:
    """Where a finished run's tables are read from, and what is told about it. No part of a run: every tier gives the same vectors."""

    table_tier: typing.Literal["resident", "host", "mapped", "tiered"] = "resident"
    """resident: beside the weights; host: in host memory; mapped: where the file lies; tiered: mapped, with a hot set in memory."""
    hot_share: float = 0.1
    """tiered: the share of each table's rows that is kept in memory, those read most."""
    hot_from: str = ""
    """tiered: folder of recorded rows (--record-rows) that says which rows are read most; empty: the run's training text."""
    verify_rows: float = 0.0
    """recompute this share of the rows, at least one a request, by plain reads and checksums; the first that differs ends the run."""
    stats: bool = False
    """print what was read, from which tier, and the time spent waiting for it."""
    stats_to: Path | None = None
    """write the same as JSON."""
    record_rows: Path | None = None
    """folder that receives how often each row was read, for --hot-from."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "run"
    data: DataConfig = field(default_factory=DataConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def replace(self, **dotted: Any) -> "Config":
        """A copy with e.g. `replace(train__lr=0.004)` changed; `__` stands for the dot. Raises ConfigError."""
        tree = as_dict(self)
        for key, value in dotted.items():
            _put(tree, key.split("__"), value, where="replace")
        return _build(Config, tree, "replace")


def load_config(where: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a preset by name ("demo"), a TOML file or a run folder, and apply dotted overrides.

    Raises: ConfigError for a missing file, broken TOML, unknown keys (nearest named) and values of the wrong type.
    """
    path = find_config(where)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f'override "{text}": write section.key=value, e.g. train.lr=0.004')
        _put(tree, key.strip().split("."), _parse(value.strip()), where=f'override "{text}"')
    tree.setdefault("name", path.stem)
    return _build(Config, tree, str(path))


def with_grid(config: Config, over: Iterable[str]) -> Config:
    """The config with one grid, from axes like `budget.rho=[1.0, 0.6]`; unchanged without any. Raises ConfigError."""
    grid = {}
    for text in over:
        key, equals, value = text.partition("=")
        values = _parse(value.strip())
        if not equals or not isinstance(values, list):
            raise ConfigError(f'--over "{text}": write section.key=[value, value, ...], e.g. budget.rho=[1.0,0.6]')
        grid[key.strip()] = values
    return config.replace(sweep__grids=[grid]) if grid else config


def dotted_values(words: Iterable[str], option: str) -> dict[str, Any]:
    """`key=value` words as {dotted key: value}, values as TOML has them, else as text. Raises ConfigError naming the option."""
    found = {}
    for text in words:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f'{option} "{text}": write section.key=value, e.g. budget.rho=0.6')
        found[key.strip()] = _parse(value.strip())
    return found


def find_config(where: str | Path) -> Path:
    """The TOML file meant by a path, a run folder, or a preset's name. Raises ConfigError."""
    path = Path(where)
    if path.is_dir() and (path / "config.toml").is_file():
        return path / "config.toml"
    if path.is_file():
        return path
    root = shipped("configs")
    files = [file for file in sorted(root.rglob("*.toml")) if file.stem != "sources"]
    presets = {
        file.stem: file for file in files
    }  # of two with one name, that of the later folder; the other by its folder
    named = path.with_suffix("").as_posix().removeprefix("configs/")
    known = {file.relative_to(root).with_suffix("").as_posix(): file for file in files} | presets
    if path.suffix in ("", ".toml") and named in known:
        return known[named]
    raise ConfigError(
        f'config "{where}": no such file, run folder or preset{nearest(path.stem, presets)}; presets: {", ".join(presets)}'
    )


def shipped(folder: str) -> Path:
    """A folder that travels with the package (`configs`, `data`): inside an installed wheel, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def as_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts, tuples as lists: what TOML and JSON can hold."""
    plain = dataclasses.asdict(config)
    return _lists(plain)


def to_toml(config: Config) -> str:
    """The whole config as TOML; `load_config` reads it back equal."""
    import tomli_w

    return tomli_w.dumps(as_dict(config))


def differences(config: Config, base: Config | None = None) -> list[tuple[str, Any, Any]]:
    """(dotted key, base value, value) wherever `config` differs from `base` (default: the defaults)."""
    left, right = flat(as_dict(base or Config())), flat(as_dict(config))
    return [(key, left.get(key), right.get(key)) for key in right | left if left.get(key) != right.get(key)]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys: {"train": {"lr": 0.1}} -> {"train.lr": 0.1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(tree: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f'{where}: "{key}" is a value, not a section')
    tree[keys[-1]] = value


def _build(kind: type, tree: Mapping[str, Any], where: str, prefix: str = "") -> Any:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise ConfigError(f'{where}: unknown key "{prefix}{key}"{nearest(key, hints)}')
        values[key] = _cast(hints[key], value, f"{prefix}{key}", where)
    return kind(**values)


def _cast(hint: Any, value: Any, key: str, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(hint, value, where, f"{key}.")
    elif isinstance(hint, types.GenericAlias) and hint.__origin__ is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_cast(hint.__args__[0], item, key, where) for item in value)
    elif isinstance(hint, types.GenericAlias) and hint.__origin__ is dict:
        if isinstance(value, dict):
            return {str(name): _cast(hint.__args__[1], item, f"{key}.{name}", where) for name, item in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is list and isinstance(value, tuple):
        return list(value)
    elif type(value) is hint:
        return value
    raise ConfigError(f'{where}: "{key}" must be {_in_words(hint)}, got {value!r}')


def _in_words(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "a section"
    if isinstance(hint, types.GenericAlias):
        kind, of = ("a list", hint.__args__[0]) if hint.__origin__ is tuple else ("a table", hint.__args__[1])
        return f"{kind} of {'table' if isinstance(of, types.GenericAlias) else of.__name__}"
    return {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list"}[hint]
