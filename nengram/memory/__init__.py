"""Vectors and hidden states into an update of the residual stream."""

from nengram.memory.baselines import MEMORIES, Additive
from nengram.memory.engram import FAMILIES, GATES, Engram
from nengram.memory.short_conv import ConvPast, ConvState
from nengram.memory.step import MemoryStep
from nengram.memory.table import Table, hot_name, load_table, open_store, order_labels, save_table

__all__ = [
    "FAMILIES",
    "GATES",
    "MEMORIES",
    "Additive",
    "ConvPast",
    "ConvState",
    "Engram",
    "MemoryStep",
    "Table",
    "hot_name",
    "load_table",
    "open_store",
    "order_labels",
    "save_table",
]
