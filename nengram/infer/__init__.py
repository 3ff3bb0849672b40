"""Weights into text: a finished run, and tokens one after another."""

from nengram.infer.engine import LoadedRun, generate, load_run, stream_text
from nengram.infer.sampling import Sampler
from nengram.infer.tokens import TextPieces, encode

__all__ = ["LoadedRun", "Sampler", "TextPieces", "encode", "generate", "load_run", "stream_text"]
