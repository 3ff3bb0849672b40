"""Questions to models: the head-to-head, tuning, verdicts, traces, reports."""

from nengram.study.compare import compare, gather
from nengram.study.tokens import token_gains
from nengram.study.tune import tune
from nengram.study.verdict import Paired, paired, prediction_interval

__all__ = ["Paired", "compare", "gather", "paired", "prediction_interval", "token_gains", "tune"]
