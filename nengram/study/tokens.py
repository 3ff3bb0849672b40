"""Where memory helped and where it hurt: single held-out tokens, in context, with the n-gram that was looked up.

A mean hides the story. The gain of a token is the loss of pure MoE minus the loss of the memory arm, averaged over seeds; the n-gram
shown is the longest that the memory reads at the position before the token (compressed ids, as hashed), with how often that n-gram
stands in the train split (of which a short run reads a part). Template-rich text shows here at once: the same n-gram, many thousand
times.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from nengram.address import count_of, ngram_counts, ngrams_of
from nengram.config import Config
from nengram.study.arm import load_nats
from nengram.text import Packed, Prepared


@dataclass(frozen=True)
class TokenGain:
    """One held-out token. Losses are in nats, means over seeds."""

    source: str
    before: str
    token: str
    after: str
    ngram: str
    count_in_training: int
    nats_without: float
    nats_with: float

    @property
    def gain(self) -> float:
        """Loss without memory minus loss with it; above zero memory helped."""
        return self.nats_without - self.nats_with


def token_gains(config: Config, data: Prepared, out: Path, most: int = 20) -> tuple[list[TokenGain], list[TokenGain]]:
    """The `most` test tokens that memory helped most, and those it hurt most; one per distinct n-gram and token."""
    with_N, without_N = (
        np.mean([load_nats(out / f"{arm}-s{seed}") for seed in config.compare.seeds], axis=0)
        for arm in ("engram", "moe")
    )
    order = config.memory.max_order
    test, train = data.splits["test"], data.splits["train"]
    counts = ngram_counts(data.compression(train.ids_N.astype(np.int64)), starts_of(train), order)
    ngrams_NO = ngrams_of(data.compression(test.ids_N.astype(np.int64)), starts_of(test), order)
    gain_N = np.where(np.isfinite(with_N), without_N - with_N, 0.0)
    ranked = np.argsort(gain_N, kind="stable")

    def pick(positions: np.ndarray) -> list[TokenGain]:
        chosen, seen = [], set()
        for position in positions:
            name = (*ngrams_NO[position - 1].tolist(), int(test.ids_N[position]))
            if name in seen:
                continue
            seen.add(name)
            around = test.text_around(int(position), data.tokenizer)
            chosen.append(
                TokenGain(
                    source=test.sources[int(test.source_of(np.array([position]))[0])],
                    before=around.before,
                    token=around.token,
                    after=around.after,
                    ngram=data.tokenizer.decode(
                        test.ids_N[max(0, position - order) : position].tolist(), skip_special_tokens=False
                    ),
                    count_in_training=int(count_of(counts, ngrams_NO[position - 1][None])[0]),
                    nats_without=float(without_N[position]),
                    nats_with=float(with_N[position]),
                )
            )
            if len(chosen) == most:
                break
        return chosen

    return pick(ranked[::-1]), pick(ranked)


def starts_of(packed: Packed) -> np.ndarray:
    """Bool [N], true at each document's first token."""
    start_N = np.zeros(len(packed), dtype=bool)
    start_N[packed.doc_starts_D] = True
    return start_N


def print_gains(helped: list[TokenGain], hurt: list[TokenGain], console: Console) -> None:
    """Both lists, a token a line: gain, count of the n-gram in training, and the token in its context."""
    for title, gains in (("helped most", helped), ("hurt most", hurt)):
        console.print(
            f"\n[bold]held-out tokens that memory {title}[/] (nats gained, times the n-gram stands in the train split, context)"
        )
        for gain in gains:
            before, token, after = (escape(one_line(text)) for text in (gain.before[-48:], gain.token, gain.after[:20]))
            console.print(
                f"{gain.gain:+6.2f} {gain.count_in_training:6,}x  {before}[bold]⟦{token}⟧[/]{after}", highlight=False
            )


def one_line(text: str) -> str:
    """Control characters and line ends made visible, so that held-out text cannot move the cursor."""
    return "".join(char if char.isprintable() else "·" for char in text)


def to_json(helped: list[TokenGain], hurt: list[TokenGain]) -> dict:
    """For tokens.json."""
    return {
        name: [asdict(gain) | {"gain": gain.gain} for gain in gains]
        for name, gains in (("helped", helped), ("hurt", hurt))
    }
