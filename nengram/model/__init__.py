"""The Transformer: attention, MoE, blocks, cost accounting, budgets."""

from nengram.model.budget import Split, resolve, split_budget
from nengram.model.cost import Cost
from nengram.model.memories import address_spec
from nengram.model.transformer import DecodeCache, Transformer

__all__ = ["Cost", "DecodeCache", "Split", "Transformer", "address_spec", "resolve", "split_budget"]
