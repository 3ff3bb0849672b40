"""From a run folder to text, a token at a time.

A model remembers three things of a sequence: keys and values per block, the last inputs of each memory convolution, and the last few
compressed ids, which address the next token's rows. One forward pass over the prompt fills them; each further token costs one step.

**The window.** Rotary positions are only as good as the positions seen in training, so a model never reads past its training context.
When the window is full, the last half of it becomes the prompt of a new one. That is a window cut from the middle of a document, which
is what training is full of: nothing looks back across its left edge, attention or n-gram.

**Documents.** Training text is a separator followed by a document, so a prompt is read behind the separator, and wherever the separator
stands n-grams begin anew, as they did in training.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nengram.config import Config, load_config
from nengram.errors import CheckpointError, ConfigError, DataError
from nengram.infer.sampling import Sampler
from nengram.infer.tokens import TextPieces, encode
from nengram.memory import MemoryStep
from nengram.model import Transformer
from nengram.model.folder import check_identity, is_saved, load_model, open_folder
from nengram.store import HotSet
from nengram.text import CompressionMap, doc_id, load_tokenizer, tokenizer_digest


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A finished run: the model in eval mode, and all that turns text into what it reads."""

    model: Transformer
    tokenizer: Tokenizer
    compression: CompressionMap  # the map that its addresses use: the identity where memory.compress is false
    config: Config
    facts: dict  # of the manifest: digests, steps, CPU seconds

    @property
    def doc_id(self) -> int:
        """The id that separated documents in training. Raises DataError when the tokenizer has none that is known."""
        return doc_id(self.tokenizer, self.config.data.doc_token or None)


def load_run(
    folder: str | Path, *, tier: str = "resident", hot: Mapping[int, HotSet] | None = None, checked_share: float = 0.0
) -> LoadedRun:
    """Open a run folder that training finished.

    Args:
        tier, hot, checked_share: where the tables are read from, as `nengram.model.folder.load_model` takes them.
    Raises: CheckpointError when the folder is no finished run, a file is missing or damaged (by name), or tokenizer or compression
    map are not those the model was trained with (both digests shown); ConfigError for a damaged config.toml.
    """
    folder = Path(folder)
    final = folder / "final"
    if not (folder / "config.toml").is_file():
        raise CheckpointError(f"{folder}: no run here (config.toml is missing)")
    if not is_saved(final):
        raise CheckpointError(f"{folder}: this run is not finished (no final/ in it); finish it with train --resume")
    facts = open_folder(final, tier=tier)
    config = load_config(final / "config.toml")
    try:
        tokenizer = load_tokenizer(final / "tokenizer.json")
        compression = CompressionMap.load(final / "compression.safetensors")
    except DataError as error:
        raise CheckpointError(f"{error}") from None
    check_identity(facts, {"tokenizer": tokenizer_digest(tokenizer), "compression": compression.digest}, final)
    if not config.memory.compress:
        compression = CompressionMap.identity(len(compression.cids_V), compression.tokenizer_digest)
    model = Transformer(config.model, config.memory, cids_V=compression.cids_V)
    load_model(model, final, tier=tier, hot=hot, checked_share=checked_share)
    return LoadedRun(model.eval(), tokenizer, compression, config, facts)


def stream_text(
    run: LoadedRun, prompt: str, *, max_tokens: int = 64, temperature: float = 0.0, top_k: int = 0, seed: int = 0
) -> Iterator[str]:
    """Continue a text, read as the beginning of a document, until the model ends it or `max_tokens` are added.

    Yields pieces of the continuation, each a run of whole characters; other arguments as `generate`.
    Raises: DataError for a prompt that is empty, not Unicode, or longer than the model's context; ConfigError.
    """
    if not prompt:
        raise DataError("the prompt is empty: give some text to continue")
    ids = [run.doc_id, *encode(run.tokenizer, prompt)]
    tokens = generate(
        run.model,
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_id=run.doc_id,
        doc_id=run.doc_id,
    )
    return _in_pieces(tokens, TextPieces(run.tokenizer, ids))


def generate(
    model: Transformer,
    ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    stop_id: int | None = None,
    doc_id: int | None = None,
) -> Iterator[int]:
    """Continue token ids; yields the new ones as they are made. Errors are raised here, before the first is asked for.

    Args:
        model: in eval mode, as `load_run` gives it.
        ids: the prompt, 1 to `model.config.context` ids. A prompt that begins a document begins with its separator.
        max_tokens: yield at most so many; beyond the context the window restarts (see above), which a warning announces.
        temperature, top_k, seed: as `Sampler`; temperature 0 is greedy and ignores the others.
        stop_id: end before this id.
        doc_id: the document separator: n-grams begin anew wherever it stands. None: nowhere.
    Raises: DataError when the prompt is empty, too long or holds ids outside the vocabulary; ConfigError for a setting out of range.
    """
    context, vocab_size = model.config.context, model.config.vocab_size
    if not len(ids):
        raise DataError("the prompt is empty: give at least one token")
    if len(ids) > context:
        raise DataError(f"the prompt is {len(ids)} tokens long, the model reads at most {context}: give a shorter one")
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise DataError(f"token id {token} at position {place} of the prompt is outside 0..{vocab_size - 1}")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    if len(ids) + max_tokens > context + 1:  # the last token is only given out, never read
        warnings.warn(
            f"the prompt and {max_tokens} tokens are more than the {context} the model was trained on: "
            f"from there on it goes on from the last {_kept(context)}",
            stacklevel=2,
        )
    sampler = Sampler(temperature, top_k, seed)
    return _tokens(Window(model, doc_id), [int(token) for token in ids], max_tokens, sampler, stop_id)


class Window:
    """What a model reads of one sequence: at most its training context, and what it remembers of that.

    `ask` fixes what is read next and requests its table rows; `read` computes. Between the two a slow tier has time.
    """

    def __init__(self, model: Transformer, doc_id: int | None):
        self.model, self.doc_id = model, doc_id
        self.ids: list[int] = []
        self.cache = model.new_cache(1, model.config.context)
        self._asked: tuple[Tensor, MemoryStep | None] | None = None

    @torch.no_grad()
    def ask(self, ids: list[int]) -> None:
        """Read `ids` next, from a window newly cut where this one is full. Their rows are on their way when this returns."""
        context = self.model.config.context
        if len(self.ids) + len(ids) > context:
            ids, self.ids = (self.ids + ids)[-_kept(context) :], []
            self.cache = self.model.new_cache(1, context)
        self.ids = self.ids + ids
        ids_BT = torch.tensor([ids], device=self.model.embed.weight.device)
        start_BT = None if self.doc_id is None else ids_BT == self.doc_id
        self._asked = ids_BT, self.model.begin(ids_BT, start_BT=start_BT, cache=self.cache)

    @torch.no_grad()
    def read(self) -> Tensor:
        """Read what was asked for; the logits after its last id, [V]."""
        (ids_BT, step), self._asked = self._asked, None
        try:
            return self.model(ids_BT, step=step, cache=self.cache)[0, -1]
        finally:
            if step:
                step.release()

    def close(self) -> None:
        """Give back the rows of what was asked for and never read."""
        if self._asked and self._asked[1]:
            self._asked[1].release()
        self._asked = None


def _tokens(window: Window, ids: list[int], max_tokens: int, sampler: Sampler, stop_id: int | None) -> Iterator[int]:
    try:
        window.ask(ids)
        for made in range(1, max_tokens + 1):
            token = sampler(window.read())
            if token == stop_id:
                return
            if made < max_tokens:
                window.ask([token])  # before the caller gets the token: its rows travel while the caller prints
            yield token
    finally:
        window.close()


def _in_pieces(tokens: Iterator[int], pieces: TextPieces) -> Iterator[str]:
    for token in tokens:
        if piece := pieces.add(token):
            yield piece
    if rest := pieces.rest():
        yield rest


def _kept(context: int) -> int:
    return max(1, context // 2)
