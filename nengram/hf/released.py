"""A released `qwen4_exp` model of transformers with its n-gram tables on any tier.

transformers keeps the table as an `nn.Embedding`: 95 GiB in memory before the first token. Here it is left out of the
load, and a module that reads a store stands in its place; everything else is the library's unchanged code, and outputs
are the same bits.

    model = load_with_table(folder, tier="mapped")          # rows are read where the checkpoint has them
    model = with_table(model, "tables/", tier="resident")   # a model that is loaded, tables from `nengram table convert`

Which rows a pass will read is known from its ids. They are asked for before the first block, so that reads of a slow
tier go on while the blocks before a memory layer compute; the layer's own rows decide, and what was asked for in vain
is given back.

Tables are read, not trained, and no part of the state dict: `save_pretrained` writes the model without them.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from nengram.address import Addresser, AddressSpec
from nengram.errors import CheckpointError, ConfigError, StoreError
from nengram.memory import open_store
from nengram.memory.checkpoint_files import CONFIG
from nengram.memory.checkpoint_store import open_released
from nengram.memory.layout_qwen import QwenPle
from nengram.memory.layouts import tables_in
from nengram.memory.table import address_of, open_rows
from nengram.store import HotSet, Store, Ticket

try:
    import transformers
    from transformers import AutoConfig, PreTrainedModel
    from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen
except ModuleNotFoundError as missing:
    raise ConfigError(f"{missing.name} is missing: pip install nengram[hf], transformers 5.16 or newer") from None

Hot = HotSet | str | os.PathLike
Tables = Mapping[int, Store] | str | os.PathLike
IDS_STATE = 2  # where transformers' cache keeps the last ids of a memory layer


class TableEmbedding(nn.Module):
    """In place of the `nn.Embedding` of one memory layer: row numbers in, a store's vectors out.

    weight: empty; its device and dtype, which follow the model's, are those of what comes out.
    used, asked: how many passes found their rows asked for, and how many asked.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("weight", weight, persistent=False)
        self.store: Store | None = None
        self.asked = self.used = 0
        self._open: tuple[Tensor, Ticket] | None = None

    def ask(self, rows_BTS: Tensor) -> None:
        """Begin to read rows that the next call is expected to want; an earlier question is withdrawn."""
        self._withdraw()
        self.asked += 1
        self._open = rows_BTS, self._store().prefetch(rows_BTS)

    @torch.compiler.disable
    def forward(self, rows_BTS: Tensor) -> Tensor:
        """The vectors `[B, T, S, E]`, the caller's own. Raises: StoreError when they cannot be read."""
        with self._ticket(rows_BTS.detach()) as ticket:
            return ticket.vectors().to(self.weight.device, self.weight.dtype, copy=True)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.store!r}"

    def _ticket(self, rows_BTS: Tensor) -> Ticket:
        if self._open is not None and torch.equal(self._open[0], rows_BTS.to(self._open[0].device)):
            self.used += 1
            (_, ticket), self._open = self._open, None
            return ticket
        self._withdraw()
        return self._store().prefetch(rows_BTS)

    def _withdraw(self) -> None:
        if self._open is not None:
            (_, ticket), self._open = self._open, None
            ticket.release()

    def _store(self) -> Store:
        if self.store is None:
            raise StoreError("this model was loaded without its tables: give it some by nengram.hf.with_table")
        return self.store


def with_table(
    model: PreTrainedModel,
    tables: Tables,
    *,
    tier: str = "mapped",
    hot: Mapping[int, Hot] | None = None,
    scale: float | None = None,
    prefetch: bool = True,
) -> PreTrainedModel:
    """Replace the n-gram tables of a `qwen4_exp` model by stores; the model is changed, and returned.

    tables: a folder of table files (or one, of a single layer), a released checkpoint, or stores by the place of their
        layer in `ple_layer_ids`, counted from 0. Files are opened on `tier`, and lent on the model's device.
    hot: for tier "tiered": hot sets, or their paths, by layer. scale: of FP8 rows in a checkpoint that holds none.
    prefetch: ask for rows before the first block.
    Stores that are replaced are not closed: they may be yours (`stores_of`).
    Raises: ConfigError for a model without such tables; CheckpointError when tables are missing, damaged, or of other
    addresses; StoreError for a tier or hot set, or stores of another size. The model is then as it was.
    """
    text = _text_model(model)
    layers = {layer.ple_layer_index: layer for layer in _ngram_layers(text)}
    spec = _spec_of(text, layers)
    if isinstance(tables, Mapping):
        stores = dict(tables)
    else:
        stores = _opened(Path(tables), spec, tier, text.embed_tokens.weight.device, hot, scale)
    for place, layer in layers.items():
        _check_store(stores.get(place), place, layer.ngram_embedding)
    for place, layer in layers.items():
        if not isinstance(layer.ngram_embedding, TableEmbedding):
            layer.ngram_embedding = _in_place_of(layer.ngram_embedding)
        layer.ngram_embedding.store = stores[place]
    text._nengram_prefetch = prefetch
    if not hasattr(text, "_nengram_hook"):
        text._nengram_hook = text.layers[0].register_forward_pre_hook(_asker(text, spec, layers), with_kwargs=True)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.disable_compile = True  # reading a store is no part of any graph
    return model


def load_with_table(
    folder: str | os.PathLike,
    tables: Tables | None = None,
    *,
    tier: str = "mapped",
    hot: Mapping[int, Hot] | None = None,
    scale: float | None = None,
    prefetch: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """`from_pretrained` without the tables, then `with_table`: no table is read into memory unless `tier` does.

    folder: a local checkpoint of `qwen4_exp`. tables: the folder's own if not given. options: of `from_pretrained`, e.g.
    dtype or device_map.
    Raises: as `with_table`; whatever `from_pretrained` raises.
    """
    if not (Path(folder) / CONFIG).is_file():
        raise CheckpointError(f"{folder}: no local folder of a model ({CONFIG} is not in it)")
    named = (AutoConfig.from_pretrained(folder).architectures or ["none"])[0]
    kind = getattr(transformers, named, None)
    if not (isinstance(kind, type) and issubclass(kind, qwen.Qwen4ExpPreTrainedModel)):
        raise ConfigError(f"{folder}: its architecture is {named}; tables are taken out of qwen4_exp models only")
    with _leaving_tables_out(kind):
        model = kind.from_pretrained(folder, **options)
    return with_table(model, tables or folder, tier=tier, hot=hot, scale=scale, prefetch=prefetch)


def stores_of(model: PreTrainedModel) -> dict[int, Store]:
    """The stores that a model reads, by place of the layer: for counters, or to close them."""
    layers = _ngram_layers(model)
    return {
        layer.ple_layer_index: layer.ngram_embedding.store
        for layer in layers
        if isinstance(layer.ngram_embedding, TableEmbedding)
    }


@contextmanager
def _leaving_tables_out(kind: type[PreTrainedModel]) -> Iterator[None]:
    """Inside, models are built with modules that read stores; tensors of tables in a checkpoint are passed by."""
    built = qwen.Qwen4ExpTextNGramEmbedding.__init__

    def init(self, *given: Any, **named: Any) -> None:
        built(self, *given, **named)  # on the meta device, as all of `from_pretrained`
        self.ngram_embedding = _in_place_of(self.ngram_embedding)

    passed_by = [*(kind._keys_to_ignore_on_load_unexpected or []), r"\.ple_embedding\.ngram_embedding\."]
    with ExitStack() as changed:
        changed.enter_context(mock.patch.object(qwen.Qwen4ExpTextNGramEmbedding, "__init__", init))
        changed.enter_context(mock.patch.object(kind, "_keys_to_ignore_on_load_unexpected", passed_by))
        yield


def _in_place_of(embedding: nn.Module) -> TableEmbedding:
    """An FP8 embedding gives vectors in the dtype of its scale, any other in that of its rows."""
    like = getattr(embedding, "weight_scale", embedding.weight)
    device = "cpu" if like.is_meta else like.device
    weight = torch.empty(0, dtype=like.dtype, device=device)
    return TableEmbedding(embedding.num_embeddings, embedding.embedding_dim, weight)


def _text_model(model: PreTrainedModel) -> nn.Module:
    for module in model.modules():
        if isinstance(module, qwen.Qwen4ExpTextModel) and _ngram_layers(module):
            return module
    raise ConfigError(f"{type(model).__name__} has no n-gram table to replace: it takes a qwen4_exp with ple_layer_ids")


def _ngram_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, qwen.Qwen4ExpTextNGramEmbedding)]


def _spec_of(text: nn.Module, layers: Mapping[int, nn.Module]) -> AddressSpec:
    """The addresses of a model's config, after the numbers that the model computes with. Raises: ConfigError."""
    spec = QwenPle().spec_of(text.config.to_dict())
    for place, layer in layers.items():
        ours = spec.multipliers(place).tolist(), spec.moduli(place).reshape(-1).tolist()
        if ours != (layer.layer_multipliers.tolist(), layer.ngram_heads_vocab_sizes.tolist()):
            raise ConfigError(
                f"memory layer {place} computes rows with other numbers than its config makes "
                f"({spec.word_code}): reload the model"
            )
    return spec


def _opened(
    path: Path, spec: AddressSpec, tier: str, device: torch.device, hot: Mapping[int, Hot] | None, scale: float | None
) -> dict[int, Store]:
    """A store for every layer, from table files or from a released checkpoint. Raises: CheckpointError, StoreError."""
    is_released = (path / CONFIG).is_file()
    files = {} if is_released else _by_layer(path)
    stores: dict[int, Store] = {}
    try:
        for place in spec.layer_ids:
            place_of = {"device": device, "hot": (hot or {}).get(place)}
            if is_released:
                found = open_released(path, place, tier, scale=scale, **place_of)
                stores[place] = found.store
                _check_same(path, found.spec, spec)
            elif place not in files:
                raise CheckpointError(f"{path}: has no table of memory layer {place}, only of {sorted(files)}")
            else:
                stores[place] = open_store(files[place], tier, spec=spec, layer_id=place, **place_of)
        return stores
    except BaseException:
        for store in stores.values():
            store.close()
        raise


def _by_layer(path: Path) -> dict[int, Path]:
    found = {}
    for file in tables_in(path):
        with open_rows(file) as table:
            found[address_of(table)[1]] = file
    if not found:
        raise CheckpointError(f"{path}: neither a released checkpoint ({CONFIG} is not in it) nor a folder of tables")
    return found


def _check_same(path: Path, found: AddressSpec, wanted: AddressSpec) -> None:
    if found.digest != wanted.digest:
        raise CheckpointError(
            f"{path}: its config makes addresses {found.word_code}, the model's are {wanted.word_code}: "
            "its rows would be read under other n-grams"
        )


def _check_store(store: Store | None, place: int, embedding: nn.Module) -> None:
    wanted = embedding.num_embeddings, embedding.embedding_dim
    if store is None or (store.num_rows, store.row_width) != wanted:
        has = "none" if store is None else f"{store.num_rows:,} rows of {store.row_width}"
        raise StoreError(f"memory layer {place} needs a table of {wanted[0]:,} rows of {wanted[1]}, not {has}")


def _asker(text: nn.Module, spec: AddressSpec, layers: Mapping[int, nn.Module]):
    """The hook before the first block: it has the ids as the memory layers will get them, masked, and the cache."""
    addresser = Addresser(spec)
    first = min(layers.values(), key=lambda layer: layer.layer_idx)

    @torch.compiler.disable
    def ask(_: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        ids_BT = named.get("ple_input_ids")
        if ids_BT is None or not text._nengram_prefetch:
            return
        cache = named.get("cache", named.get("past_key_values"))  # by version
        history = None if cache is None else cache.get_conv_state(first.layer_idx, state_idx=IDS_STATE)
        length = ids_BT.shape[1]
        if history is not None:
            ids_BT = torch.cat([history.to(ids_BT), ids_BT], dim=1)
        rows = addresser(ids_BT.long())
        for place in sorted(layers, key=lambda place: layers[place].layer_idx):
            layers[place].ngram_embedding.ask(rows[place][:, -length:])

    return ask
