"""The table file: plain safetensors with extra promises, read by byte range and written once through.

    table_layout.py   where everything lies, what has to fit what
    table_chunks.py   checksums
    table_reader.py   a file, or a folder of shards, read by rows
    table_writer.py   rows in order to disk
    table_index.py    the index of a folder
    table_place.py    one writer at a time, whole or not at all

The specification is docs/format.md.
"""

from nengram.store.table_layout import CHUNK_BYTES, FORMAT
from nengram.store.table_reader import TableFile, TableReader, open_table
from nengram.store.table_writer import TableWriter, create_zero_table, write_table

__all__ = [
    "CHUNK_BYTES",
    "FORMAT",
    "TableFile",
    "TableReader",
    "TableWriter",
    "create_zero_table",
    "open_table",
    "write_table",
]
