"""The verbs of `nengram table`: tables on disk."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from nengram.cli.terminal import Into, Overrides, Source, results_folder, terminal


def table_stat(paths: Positional[tuple[Path, ...]], /, json: bool = False) -> None:
    """Say what a table is: codec, rows, bytes, what was ever written, addresses, rows of each n-gram order.

    Args:
        paths: table files, folders of shards, or folders and runs that hold tables.
        json: print JSON instead of text.
    """
    from nengram.study.table_verbs import run_stat

    run_stat(paths, as_json=json, console=terminal())


def table_verify(paths: Positional[tuple[Path, ...]], /, json: bool = False) -> None:
    """Read tables wholly: every checksum, and the row counts, made again from the primes of their addresses.

    Args:
        paths: table files, folders of shards, or folders and runs that hold tables.
        json: print JSON instead of text.
    """
    from nengram.study.table_verbs import run_verify

    run_verify(paths, as_json=json, console=terminal())


def table_pack(
    source: Positional[Source],
    into: Positional[Into],
    /,
    codec: str = "",
    shards: int = 1,
    scale: float | None = None,
) -> None:
    """Write a table again: in another codec, in shards, or in the newest format. Optimiser state stays behind.

    Args:
        source: table file or folder of shards.
        into: the new file; with --shards above 1 a folder.
        codec: fp32, bf16, fp16, fp8, fp8_tensor, int8 or int4; the same codec, hence a copy, if not given.
        shards: files to cut it into, by rows.
        scale: of codec fp8_tensor; found in a pass over the table if not given.
    """
    from nengram.study.table_verbs import run_pack

    run_pack(source, into, codec=codec, shards=shards, scale=scale, console=terminal())


def table_slice(
    source: Positional[Source], into: Positional[Into], /, rows: str = "", order: int | None = None
) -> None:
    """Cut some rows out of a table, into a file that says which they are.

    Args:
        source: table file or folder of shards.
        into: the new file.
        rows: FIRST:END, END not included.
        order: all rows of one n-gram order instead, e.g. 2.
    """
    from nengram.study.table_verbs import run_slice

    run_slice(source, into, rows=rows, order=order, console=terminal())


def table_create(
    into: Positional[Into],
    target: Positional[str],
    overrides: Positional[Overrides] = (),
    /,
    layer: int | None = None,
    codec: str = "",
    scale: float | None = None,
) -> None:
    """Make a table of zeros: a sparse file, which takes no space until it is written.

    Args:
        into: the new file.
        target: whose addresses: preset name, TOML file, run folder or table.
        overrides: dotted keys, e.g. memory.row_width=64.
        layer: memory layer, where there are several.
        codec: how rows are stored; the target's own if not given.
        scale: of codec fp8_tensor; 1 if not given.
    """
    from nengram.study.table_verbs import run_create

    run_create(into, target, overrides, layer=layer, codec=codec, scale=scale, console=terminal())


def table_convert(
    source: Positional[Source],
    into: Positional[Into],
    /,
    to: Literal["nengram", "deepseek_v41", "qwen_ple"] = "nengram",
    layers: tuple[int, ...] = (),
    shards: int = 1,
    scale: float | None = None,
    config: Path | None = None,
    tokenizer: str = "",
) -> None:
    """Turn the tables of a released checkpoint into table files, or tables into such a checkpoint; bytes are copied.

    Args:
        source: checkpoint folder or file (what it is, is found out), or tables: a file, a folder of them, a run.
        into: folder for the tables, or for the checkpoint; a single layer may name a .safetensors file.
        to: what to make.
        layers: only these memory layers, by the ids of their hash.
        shards: files per table, by rows.
        scale: of FP8 rows in a checkpoint that holds no tensor with their scale.
        config: the checkpoint's config.json, where it does not lie beside.
        tokenizer: the checkpoint's tokenizer.json, where it does not lie beside; checks the compressed vocabulary.
    """
    from nengram.study.table_verbs import run_convert

    run_convert(
        source,
        into,
        to=to,
        layers=layers,
        shards=shards,
        scale=scale,
        config=config,
        tokenizer=tokenizer,
        console=terminal(),
    )


def table_diff(
    one: Positional[Source],
    other: Positional[Annotated[Path, tyro.conf.arg(metavar="OTHER")]],
    /,
    corpus: str = "",
    tokenizer: str = "",
    doc_token: str = "",
    tolerance: float = 0.0,
    most: int = 20,
    json: bool = False,
) -> None:
    """What changed between two tables: how many rows, and which n-grams of a corpus read them.

    Args:
        one: table file or folder of shards.
        other: another of the same addresses, in any codec.
        corpus: text to name the changes by: "bundled", "facts", a file or folder; rows are only counted if not given.
        tokenizer: the tables' tokenizer.json, where it does not lie beside one of them.
        doc_token: the token that separates documents, where it cannot be guessed.
        tolerance: numbers that differ by this much or less are the same.
        most: n-grams to name.
        json: print JSON instead of text.
    """
    from nengram.study.table_verbs import run_diff

    run_diff(
        one,
        other,
        corpus=corpus,
        tokenizer=tokenizer,
        doc_token=doc_token,
        tolerance=tolerance,
        most=most,
        as_json=json,
        console=terminal(),
    )


def table_codecs(
    run: Positional[Path],
    /,
    codecs: tuple[str, ...] = (),
    split: Literal["dev", "test"] = "dev",
    tokens: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """What each codec costs a finished run: bytes, error of a row, and the loss with its tables so coded.

    Args:
        run: run folder.
        codecs: only these; all if not given.
        split: held-out text to judge on.
        tokens: judge about so many; 0: the whole split.
        out: folder for codecs.json and codecs.png.
        json: print JSON instead of a table.
    """
    from nengram.store.codecs import CODECS
    from nengram.study.codecs import run_codec_report

    chosen = codecs or tuple(CODECS)
    options = {"codecs": chosen, "split": split, "tokens": tokens, "as_json": json, "out": results_folder(out)}
    run_codec_report(run, **options, console=terminal())


def table_health(run: Positional[Path], /, out: Path | None = None, json: bool = False) -> None:
    """What training did to a run's tables: rows touched, shared and updated, their norms, and the gate by frequency.

    Args:
        run: run folder.
        out: folder for health.json and health.png.
        json: print JSON instead of tables.
    """
    from nengram.study.health import run_health

    run_health(run, as_json=json, out=results_folder(out), console=terminal(stderr=json))
