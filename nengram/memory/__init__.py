"""Vectors and hidden states into an update of the residual stream."""

from nengram.memory.baselines import MEMORIES, Additive
from nengram.memory.engram import Engram
from nengram.memory.short_conv import ConvState
from nengram.memory.step import MemoryStep
from nengram.memory.table import Table, load_table, save_table

__all__ = ["MEMORIES", "Additive", "ConvState", "Engram", "MemoryStep", "Table", "load_table", "save_table"]
