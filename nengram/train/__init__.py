"""Predictions into weights: the loop, optimisers, checkpoints, held-out loss."""

from nengram.train.evaluate import token_nats
from nengram.train.loop import Record, build_model, environment, steps_of, train
from nengram.train.optim import RowOptimizer, lr_share

__all__ = ["Record", "RowOptimizer", "build_model", "environment", "lr_share", "steps_of", "token_nats", "train"]
