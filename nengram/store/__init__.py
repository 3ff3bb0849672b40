"""Rows into vectors: where a table lives, how it is read, how it learns."""

from nengram.store.base import Store, Ticket
from nengram.store.coalesce import coalesce
from nengram.store.resident import ResidentStore
from nengram.store.rules import RULES, RowwiseAdagrad, RowwiseRMSprop, Rule, SparseAdam, make_rule

__all__ = [
    "RULES",
    "ResidentStore",
    "RowwiseAdagrad",
    "RowwiseRMSprop",
    "Rule",
    "SparseAdam",
    "Store",
    "Ticket",
    "coalesce",
    "make_rule",
]
