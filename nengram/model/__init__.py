"""The Transformer: attention, MoE, blocks, cost accounting, budgets."""

from nengram.model.budget import Split, resolve, split_budget
from nengram.model.cost import Cost
from nengram.model.transformer import DecodeCache, Transformer, address_spec

__all__ = ["Cost", "DecodeCache", "Split", "Transformer", "address_spec", "resolve", "split_budget"]
