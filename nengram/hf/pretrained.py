"""Tables beside the weights: `save_pretrained` and `from_pretrained` for models whose largest part is no Parameter.

    folder/
    ├── config.json                 sizes, AddressSpec, digests: `nengram.hf.configuration`
    ├── model.safetensors           backbone, projections and compression map; or shards and their index, as transformers writes them
    ├── table-<layer>.safetensors   one per memory layer, our own format: checksums, addresses, any tier
    ├── nengram.json                the seals of the tables, written last: without it a save was cut short
    └── tokenizer.json, ...         whatever else lies there stays

A save fills a folder beside the place and is renamed into it, so a reader finds the old model or the new one. Where sub-folders are in
the way (a Trainer's output) files are renamed one by one, and what a crash leaves there lacks nengram.json and is refused.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from nengram.config import TABLE_TIERS
from nengram.errors import CheckpointError, ConfigError, StoreError, nearest
from nengram.files import sync_file, sync_folder, word_code, write_atomic
from nengram.memory import open_store, save_table
from nengram.model import Transformer
from nengram.model.folder import swap_folder, table_path, unwritten
from nengram.store import CheckedStore, HotSet, open_table
from nengram.store.table_place import remove
from nengram.text import CompressionMap

SEALS = "nengram.json"
FORMAT = "nengram-hf-1"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
HUB = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


class TablesBeside:
    """What a PreTrainedModel around a `Transformer` (its base model's `stack`) does so that tables are saved and found."""

    @property
    def tables(self) -> Transformer:
        """The `Transformer` whose `stores` hold the tables."""
        return self.base_model.stack

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the model, its tables and, where the model came from a folder with one, the tokenizer; whole or not at all.

        options: as of transformers (`max_shard_size`, ...). A table that is only read is copied from the file that it is read from.
        Raises: ConfigError with push_to_hub; CheckpointError, OSError: the old folder is then as it was.
        """
        if push_to_hub:
            raise ConfigError("push_to_hub is not offered: save_pretrained(folder), then upload the folder as it is")
        if not is_main_process:
            return
        folder = Path(save_directory).absolute()
        beside = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            self._describe()
            super().save_pretrained(beside, state_dict=state_dict, **options)
            self._save_tables(beside, folder)
            self._copy_tokenizer(beside, folder)
            _sync(beside)
            _put(beside, folder)
        except SafetensorError as error:
            raise unwritten(folder, error) from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *arguments: Any,
        table_tier: str = "resident",
        table_hot: Mapping[int, HotSet] | None = None,
        table_checked: float = 0.0,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """A model that `save_pretrained` wrote, its tables on any tier; the rest of the arguments are transformers' own.

        table_tier: one of `nengram.config.TABLE_TIERS`: "resident" (beside the weights), "host", "mapped" (read where the files lie) or
            "tiered" (mapped, with the rows of `table_hot` in memory). dtype and device_map mean the weights, never the tables.
        table_checked: recompute this share of every request's rows by plain reads.
        Raises: CheckpointError, naming what is missing, damaged or of other addresses; StoreError for an unknown tier.
        """
        if table_tier not in TABLE_TIERS:
            known = ", ".join(TABLE_TIERS)
            raise StoreError(f'unknown tier "{table_tier}"{nearest(str(table_tier), TABLE_TIERS)}; there are {known}')
        name = pretrained_model_name_or_path
        try:
            model, info = super().from_pretrained(name, *arguments, output_loading_info=True, **options)
        except SafetensorError as error:
            raise CheckpointError(f"{name}: its weights cannot be read: {error}") from None
        _check_weights(name, info)
        stack = model.tables
        for moe in stack.moes():
            moe.load_X.zero_()  # was not saved
        if stack.spec is not None:
            stack.cids_V = model.base_model.cids_V
            _check_map(name, model.config, stack)
            find = _finder(name, options)
            stack.stores |= _open_tables(find, stack, table_tier, table_hot, table_checked)
            model.base_model.table_files = {layer_id: find(table_name(layer_id)) for layer_id in stack.spec.layer_ids}
        return (model, info) if output_loading_info else model

    def _describe(self) -> None:
        """Write into the config what its reader will compare: addresses and compression map as they are now."""
        if self.tables.spec is None:
            return
        self.config.address_spec = json.loads(self.tables.spec.to_json())
        cids_V = CompressionMap(self.base_model.cids_V.cpu().numpy())
        tokenizer = (self.config.compression or {}).get("tokenizer_digest", "")
        self.config.compression = {"digest": cids_V.digest, "tokenizer_digest": tokenizer}

    def _save_tables(self, beside: Path, folder: Path) -> None:
        seals = {}
        for layer_id, store in self.tables.stores.items():
            path, source = table_path(beside, layer_id), self.base_model.table_files.get(layer_id)
            try:
                save_table(path, store, self.tables.spec, layer_id)
            except StoreError:  # it only reads: its file is the table
                if source is None:
                    raise
                _copy(source, path, link=source.parent == folder)
            with open_table(path) as table:
                seals[path.name] = table.digest
        write_atomic(beside / SEALS, json.dumps({"format": FORMAT, "tables": seals}, indent=1))

    def _copy_tokenizer(self, beside: Path, folder: Path) -> None:
        source = Path(self.config.name_or_path or folder)
        for name in TOKENIZER:
            if (source / name).is_file() and not (folder / name).exists():
                shutil.copyfile(source / name, beside / name)


def table_name(layer_id: int) -> str:
    """How the table of a memory layer is called in a folder."""
    return table_path(Path(), layer_id).name


def _open_tables(find: Any, stack: Transformer, tier: str, hot: Mapping[int, HotSet] | None, checked: float) -> dict:
    """The stores of all memory layers, from the files that `find` gives. Raises: CheckpointError, StoreError."""
    seals, stores = _seals(find), {}
    place = {"spec": stack.spec, "row_width": stack.memory_config.row_width, "device": stack.embed.weight.device}
    try:
        for layer_id in stack.spec.layer_ids:
            path = find(table_name(layer_id))
            rows = hot[layer_id] if tier == "tiered" and hot else None
            store = stores[layer_id] = open_store(path, tier, layer_id=layer_id, hot=rows, **place)
            with open_table(path) as table:
                if table.digest != seals.get(path.name):
                    raise CheckpointError(f"{path}: is another table (its seal is not the one in {SEALS})")
            if checked:
                stores[layer_id] = CheckedStore(store, open_table(path), sample=checked)
    except BaseException:
        for store in stores.values():
            store.close()
        raise
    return stores


def _seals(find: Any) -> dict[str, str]:
    path = find(SEALS)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this program reads {FORMAT!r}")
        return dict(content["tables"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); save the model again") from None


def _finder(name: str | os.PathLike, options: Mapping[str, Any]) -> Any:
    """A function from a file's name to its path, in a local folder or in transformers' cache of the hub."""
    where = {key: options[key] for key in HUB if options.get(key) is not None}

    def find(file: str) -> Path:
        path = Path(name, where.get("subfolder", ""), file)
        if path.exists():
            return path
        found = (
            None
            if Path(name).is_dir()
            else cached_file(name, file, _raise_exceptions_for_missing_entries=False, **where)
        )
        if found is None:
            raise CheckpointError(f"{path}: missing; a save was cut short, or the file was not copied with the others")
        return Path(found)

    return find


def _check_weights(name: str | os.PathLike, info: Mapping[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{name}: the weights lack {missing[0]} ({len(missing)} missing in all)")


def _check_map(name: str | os.PathLike, config: Any, stack: Transformer) -> None:
    """Compression map and memory layers are those that the addresses were made for. Raises: CheckpointError."""
    blocks = {block.layer_id for block in stack.memory_blocks()}
    if blocks != set(stack.spec.layer_ids):
        raise CheckpointError(
            f"{name}: config.json addresses layers {list(stack.spec.layer_ids)}, its blocks read {sorted(blocks)}"
        )
    found = CompressionMap(stack.cids_V.cpu().numpy())
    wanted = (config.compression or {}).get("digest", found.digest)
    if found.digest != wanted:
        raise CheckpointError(
            f"{name}: the weights hold compression map {word_code(found.digest)}, config.json was made for {word_code(wanted)}"
        )
    if found.compressed_vocab_size != stack.spec.compressed_vocab_size:
        raise CheckpointError(
            f"{name}: the compression map has {found.compressed_vocab_size} ids, addresses {stack.spec.word_code} "
            f"are of {stack.spec.compressed_vocab_size}"
        )


def _put(beside: Path, folder: Path) -> None:
    """`beside` in the place of `folder`; what a save does not write, and is not an older save's, stays."""
    old = sorted(folder.iterdir()) if folder.is_dir() else []
    kept = [path for path in old if not _ours(path.name) and not (beside / path.name).exists()]
    if not any(path.is_dir() for path in kept):
        for path in kept:
            _copy(path, beside / path.name, link=True)
        swap_folder(beside, folder)
        return
    (folder / SEALS).unlink(missing_ok=True)
    new = sorted(beside.iterdir(), key=lambda path: path.name == SEALS)
    for path in old:
        if _ours(path.name) and not (beside / path.name).exists():
            remove(path)
    for path in new:
        if path.is_dir():
            remove(folder / path.name)
        os.replace(path, folder / path.name)
    sync_folder(folder)


def _ours(name: str) -> bool:
    """Whether a save writes files of this name, so that one it did not write is left from an older save."""
    return name == SEALS or (
        name.startswith(("model", "table-")) and name.endswith((".safetensors", ".safetensors.index.json"))
    )


def _copy(source: Path, path: Path, *, link: bool) -> None:
    """A file or folder once more; link: a file that will soon be gone from where it is need not be written again."""
    if source.is_dir():
        shutil.copytree(source, path)
        return
    if link:
        with suppress(OSError):  # not every file system can
            os.link(source, path)
            return
    shutil.copyfile(source, path)


def _sync(folder: Path) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file()):
        sync_file(path)
