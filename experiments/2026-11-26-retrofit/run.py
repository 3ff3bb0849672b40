"""Memory grafted into the middle of SmolLM2-135M, against what the same parameters do otherwise. README.md says what is asked and why.

    python experiments/2026-11-26-retrofit/run.py --dry       arms, parameters and cost; nothing is run
    python experiments/2026-11-26-retrofit/run.py             tune and run what is not in rows.jsonl yet; stop and start at will
    python experiments/2026-11-26-retrofit/run.py --report    the tables, results.json and retrofit.png from the finished rows

`nengram data fetch smollm2` and `nengram data fetch facts` first. Hidden states (about 1 GB) are kept in --work.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nengram.errors import DataError, NengramError
from nengram.files import sha256_bytes
from nengram.hf.arms import ARMS, Sizes, make_arm
from nengram.hf.gguf import smollm2
from nengram.hf.recall import DEV, TRAINING, Fact, Sheet, ask, find_facts, sentences, sheet_of
from nengram.hf.retrofit import Windows, train_arm
from nengram.hf.retrofit_runs import Design, Material, read_rows, run_all, runs_left
from nengram.hf.suffix import Suffix, cached
from nengram.hf.vocabulary import compression_of
from nengram.model.folder import open_folder
from nengram.text import Entry, read_corpus, split_of

HERE = Path(__file__).parent
BLOCK, CONTEXT = 15, 128
LEARNT, FOREIGN = ("wordnet", "factbook", "foldoc"), ("enwiki", "stdlib")
FACTS_OF_A_RELATION, SENTENCES_OF_A_DOCUMENT = 160, 8
DEV_WINDOWS, TEST_WINDOWS = 16, 48  # of a source
SEPARATOR = 0  # <|endoftext|>, which stood between documents in pretraining


@dataclass(frozen=True)
class Text:
    """Windows of ids `[N, T + 1]` with their sources, by "train", "dev" and "test", and the questions."""

    windows: dict[str, tuple[np.ndarray, tuple[str, ...]]]
    facts: list[Fact]
    sheet: Sheet

    @property
    def digest(self) -> str:
        """Of every id."""
        parts = [ids.tobytes() for ids, _ in self.windows.values()] + [self.sheet.ids_RT.tobytes()]
        return sha256_bytes(b"".join(parts))[:16]


def build_text(tokenizer, tokens: int, corpus: str = "data/facts") -> Text:
    """A quarter facts in words, a quarter each of three sources; none of these states a fact that is asked for. Raises DataError."""
    entries: dict[str, list[Entry]] = {}
    for entry in read_corpus(corpus):
        entries.setdefault(entry.source, []).append(entry)
    missing = set(LEARNT + FOREIGN) - set(entries)
    if missing:
        raise DataError(
            f"{corpus} has no {', '.join(sorted(missing))}: `nengram data fetch facts` builds it (Debian has all of it)"
        )
    facts = find_facts(entries["wordnet"] + entries["factbook"], FACTS_OF_A_RELATION)
    shown = [fact for fact in facts if fact.shown]

    def of_source(source: str, split: str | None, count: int) -> np.ndarray:
        order = np.random.default_rng(0).permutation(len(entries[source]))
        chosen = (entries[source][place] for place in order)
        texts = (
            entry.text
            for entry in chosen
            if (split is None or split_of(entry.source, entry.key) == split)
            and not any(fact.stated_in(entry.text) for fact in facts)
        )
        return cut(texts, tokenizer, count, f"{source} ({split or 'all'})")

    def of_facts(forms: dict, count: int) -> np.ndarray:
        said = sentences(shown, forms, np.random.default_rng(0))
        return cut(iter(lambda: "\n".join(islice(said, SENTENCES_OF_A_DOCUMENT)), ""), tokenizer, count, "facts")

    quarter = -(-tokens // CONTEXT // 4)
    parts = {
        "train": {"facts": of_facts(TRAINING, quarter)} | {name: of_source(name, "train", quarter) for name in LEARNT},
        "dev": {"facts": of_facts(DEV, DEV_WINDOWS)} | {name: of_source(name, "dev", DEV_WINDOWS) for name in LEARNT},
        "test": {name: of_source(name, "test", TEST_WINDOWS) for name in LEARNT}
        | {name: of_source(name, None, TEST_WINDOWS) for name in FOREIGN},
    }
    windows = {
        split: (np.concatenate(list(found.values())), tuple(name for name, ids in found.items() for _ in ids))
        for split, found in parts.items()
    }
    return Text(windows, facts, sheet_of(ask(facts), tokenizer.backend_tokenizer, first=SEPARATOR))


def cut(texts: Iterator[str], tokenizer, count: int, name: str) -> np.ndarray:
    """`count` windows of T + 1 ids, one after another, of texts with a separator before each."""
    ids: list[int] = []
    for text in texts:
        ids += [SEPARATOR, *tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids]
        if len(ids) >= count * (CONTEXT + 1):
            return np.array(ids[: count * (CONTEXT + 1)], np.int64).reshape(count, CONTEXT + 1)
    raise DataError(
        f"{name}: text for {len(ids) // (CONTEXT + 1)} windows of the {count} wanted; ask for fewer --tokens"
    )


def prepare(arguments: argparse.Namespace) -> tuple[Design, Suffix, np.ndarray, Text, str]:
    """The design with model and text in its digest, and what it needs, hidden states apart."""
    folder = smollm2(arguments.model)
    name = open_folder(folder)["files"]["model.safetensors"][:16]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    suffix = Suffix(AutoModelForCausalLM.from_pretrained(folder, local_files_only=True), BLOCK)
    cids_V = compression_of(folder, suffix.whole.config.vocab_size).cids_V
    text = build_text(tokenizer, arguments.tokens)
    design = Design(
        arms=tuple(arguments.arms),
        seeds=tuple(arguments.seeds),
        tokens=arguments.tokens,
        rates=tuple(arguments.rates),
        sizes=Sizes(rows_per_head=arguments.rows),
        of=(name, text.digest, str(BLOCK)),
    )
    return design, suffix, cids_V, text, name


def with_hidden(text: Text, suffix: Suffix, name: str, folder: Path) -> Material:
    """Hidden states before the block, computed at the first call."""

    def hidden(ids_NT: np.ndarray, what: str) -> np.ndarray:
        def progress(done: int, of: int) -> None:
            if done % 64 == 0 or done == of:
                say(f"hidden states of {what}: {done}/{of}")

        return cached(suffix, ids_NT, folder, name, progress=progress)

    found = {
        split: Windows(ids_NT, hidden(ids_NT[:, :-1], split), sources)
        for split, (ids_NT, sources) in text.windows.items()
    }
    return Material(**found, sheet=text.sheet, sheet_hidden_RTD=hidden(text.sheet.ids_RT, "questions"))


def dry(design: Design, suffix: Suffix, cids_V: np.ndarray, text: Text, rows: list[dict]) -> None:
    """Arms and their parameters, and what is left to do at the speed of two steps here."""
    ids_NT, sources = text.windows["train"]
    shown = sum(fact.shown for fact in text.facts)
    print(
        f"{len(ids_NT)} windows to train on, {len(text.facts)} facts of which {shown} are shown, {len(text.sheet.questions)} questions"
    )
    print(f"{'arm':14}{'parameters':>12}{'touched':>12}")
    for name in design.arms:
        with make_arm(name, suffix, cids_V, ids_NT[:, :-1], sizes=design.sizes) as arm:
            counts = arm.counts(ids_NT[:, :-1])
        print(f"{name:14}{counts['total']:12,}{counts['touched']:12,}")
    few = ids_NT[: 2 * design.batch]
    windows = Windows(few, suffix.before(torch.from_numpy(few[:, :-1])).numpy(), sources[: len(few)])
    tokens = len(few) * CONTEXT
    with make_arm("graft", suffix, cids_V, ids_NT[:, :-1], sizes=design.sizes) as arm:
        train_arm(arm, suffix, windows, lr=1e-4, tokens=tokens, batch=design.batch)  # compiles
        began = time.monotonic()
        train_arm(arm, suffix, windows, lr=1e-4, tokens=tokens, batch=design.batch)
        seconds_a_token = (time.monotonic() - began) / tokens
    tuned = [arm for arm in design.arms if arm != "none"]
    runs = len(tuned) * (len(design.rates) * design.tuning_tokens + len(design.seeds) * design.tokens)
    judged = len(text.sheet.ids_RT) * text.sheet.ids_RT.shape[1] + text.windows["test"][0].size
    runs += 0.4 * judged * (len(tuned) * len(design.seeds) + 1)
    hours = runs * seconds_a_token / 3600
    print(
        f"{1 / seconds_a_token:.0f} tokens/s on {torch.get_num_threads()} thread(s): about {hours:.1f} hours for all of it"
    )
    print(f"{len(runs_left(design, rows))} runs are left now (those whose tuning is open not counted)")


def say(line: str) -> None:
    """Progress: in place on a terminal, else a line now and then would fill a log."""
    end = "\n" if not sys.stderr.isatty() else "\r"
    print(f"\x1b[2K{line}" if end == "\r" else line, end=end, file=sys.stderr, flush=True)


def main(given: list[str]) -> None:
    """Parse, prepare, do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--tokens", type=int, default=100_352, help="of a run; a multiple of 512")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=list(Design.rates))
    parser.add_argument("--rows", type=int, default=Sizes.rows_per_head, help="of a head")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="data/smollm2")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of rows.jsonl and the results")
    parser.add_argument("--work", type=Path, default=Path("runs/retrofit"), help="folder of hidden states")
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    rows_path = arguments.out / "rows.jsonl"
    if arguments.report:
        from report import report  # beside this file

        report(read_rows(rows_path), arguments.out)
        return
    design, suffix, cids_V, text, name = prepare(arguments)
    if arguments.dry:
        dry(design, suffix, cids_V, text, read_rows(rows_path))
        return
    material = with_hidden(text, suffix, name, arguments.work)
    for row in run_all(design, suffix, cids_V, material, rows_path, say=say):
        judged = row.get("dev") or row["test"]
        nats = ", ".join(f"{source} {value:.3f}" for source, value in judged.items())
        print(
            f"{row['kind']} {row['arm']} seed {row['seed']} lr {row['lr']:g}: {nats} ({row['seconds']:.0f} s)",
            flush=True,
        )
    print(f"all done; {sys.argv[0]} --report")


def as_program(main: Callable[[list[str]], None]) -> None:
    """Run it on the command line's words; a mistake is one line."""
    try:
        main(sys.argv[1:])
    except NengramError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the finished rows")


if __name__ == "__main__":
    as_program(main)
