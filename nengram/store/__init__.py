"""Rows into vectors: where a table lives, how a row is coded, how it is read, how it learns.

Every place is a `Store`, and none shows in the vectors:

    resident   in the memory of the device that computes
    host       in host memory; copied to a GPU as it is needed
    mapped     in its file
    tiered     the frequent rows in memory, above any of these
    checked    any of these, a sample recomputed
"""

from nengram.store.base import Store, Ticket
from nengram.store.checked import CheckedStore
from nengram.store.coalesce import coalesce
from nengram.store.codecs import CODECS, Codec, codec_from_dict, make_codec
from nengram.store.counters import Counters
from nengram.store.host import HostStore
from nengram.store.host_memory import host_zeros
from nengram.store.hot_set import HotSet
from nengram.store.mapped import MappedStore
from nengram.store.resident import ResidentStore
from nengram.store.row_counts import RowCounts
from nengram.store.rules import RULES, RowwiseAdagrad, RowwiseRMSprop, Rule, SparseAdam, make_rule
from nengram.store.table_file import TableFile, TableReader, TableWriter, create_zero_table, open_table, write_table
from nengram.store.tiered import TieredStore

__all__ = [
    "CODECS",
    "RULES",
    "CheckedStore",
    "Codec",
    "Counters",
    "HostStore",
    "HotSet",
    "MappedStore",
    "ResidentStore",
    "RowCounts",
    "RowwiseAdagrad",
    "RowwiseRMSprop",
    "Rule",
    "SparseAdam",
    "Store",
    "TableFile",
    "TableReader",
    "TableWriter",
    "Ticket",
    "TieredStore",
    "coalesce",
    "codec_from_dict",
    "create_zero_table",
    "host_zeros",
    "make_codec",
    "make_rule",
    "open_table",
    "write_table",
]
