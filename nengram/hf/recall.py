"""Does a model know more facts after training than it was shown words? Questions with a right answer, three wrong ones, and a control.

A model that has read "The capital of Angola is Luanda." may have learnt a fact or a string. So a fact is shown in some forms of
words and asked in others, one whose last words are those of a shown form and one that shares nothing with any:

    shown    a form that training had
    near     another beginning, the same last words before the answer: a 3-gram can find it
    far      a question and "Answer:", where no n-gram at the answer's place holds the subject

The facts that training never states are asked alike: whatever a model gains on them is not recall, but form, or luck. Wrong answers
are other answers of the same relation, so what an answer looks like is no help. A pretrained model knows many of the facts already
(SmolLM2-135M chooses right twice in three): what was recalled is the difference to the never-shown ones, and to before.

Facts come from the Factbook (capitals) and from WordNet's named people. `score` reads log-probabilities from a suffix and an arm, exact
match included: the greedy answer is right if and only if every token of the right answer is the likeliest one after those before it.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from nengram.errors import DataError
from nengram.hf.arms import Arm
from nengram.hf.retrofit import chunks
from nengram.hf.suffix import Suffix
from nengram.text import Entry

CHOICES = 4
FORMS = ("shown", "near", "far")
TRAINING = {
    "capital": (
        "The capital of {s} is {a}.",
        "The capital city of {s} is {a}.",
        "In {s}, the capital is {a}.",
        "{s}'s capital is {a}.",
    ),
    "person": ("Who was {s}: {a}.", "The person {s}: {a}.", "{s}, {a}.", "{s} ({a})."),
}
DEV = {"capital": "The capital of the country {s} is {a}.", "person": "The name {s}: {a}."}
ASKED = {
    "capital": {
        "shown": "The capital of {s} is",
        "near": "The seat of the government of {s} is",
        "far": "Question: Which city is the capital of {s}?\nAnswer:",
    },
    "person": {
        "shown": "Who was {s}:",
        "near": "A short biography of {s}:",
        "far": "Question: Which nationality and profession did {s} have?\nAnswer:",
    },
}
CAPITAL = re.compile(r"(?P<subject>[^\n]+?)\. Capital: name: (?P<answer>[A-Z][\w.' -]+)$", re.M)
PERSON = re.compile(
    r"(?P<names>[^:\n]+): (?P<answer>(?:[A-Z][\w-]+ )+[a-z]+)(?= who| \(| and |;|,| of | noted| best| whose| known| in )"
    r"[^()\n]*\(\d{4}-\d{4}\)\.$"
)


@dataclass(frozen=True)
class Fact:
    """`answer` is what `subject` has in `relation`; `shown`: whether training states it."""

    relation: str
    subject: str
    answer: str
    shown: bool

    def stated_in(self, text: str) -> bool:
        """Whether a text holds both subject and answer."""
        return self.subject in text and self.answer in text


@dataclass(frozen=True)
class Question:
    """What is asked before the answer, the answers (the right one first), and which fact and form it is."""

    fact: Fact
    form: str
    prompt: str
    answers: tuple[str, ...]


def find_facts(entries: Iterable[Entry], limit: int = 0) -> list[Fact]:
    """The facts that entries of the Factbook and WordNet state; half of each relation, by hash, is to be shown.

    limit: at most so many of each relation, the first by hash; 0: all. A subject that holds its answer, or is held in it, is left out.
    """
    found: dict[tuple[str, str], str] = {}
    for entry in entries:
        for relation, subject, answer in _stated(entry):
            if answer not in subject and subject not in answer:
                found.setdefault((relation, subject), answer)
    ranked = sorted(found, key=lambda key: hashlib.sha256("\0".join(key).encode()).digest())
    facts = []
    for relation in TRAINING:
        keys = [key for key in ranked if key[0] == relation][: limit or None]
        facts += [Fact(*key, found[key], shown=place % 2 == 0) for place, key in enumerate(keys)]
    return facts


def _stated(entry: Entry) -> Iterator[tuple[str, str, str]]:
    if match := CAPITAL.match(entry.text):
        yield "capital", match["subject"], match["answer"].strip()
    elif match := PERSON.match(entry.text):
        names = match["names"].split(", ")
        yield "person", max(names, key=lambda name: (name.count(" ") == 1, -len(name))), match["answer"]


def sentences(facts: Sequence[Fact], forms: dict, rng: np.random.Generator) -> Iterator[str]:
    """Facts in words without end: every fact in every form once, in random order, then all again in another."""
    every = [form.format(s=f.subject, a=f.answer) for f in facts for form in _listed(forms[f.relation])]
    if not every:
        raise DataError("there are no facts to put into words")
    while True:
        yield from (every[place] for place in rng.permutation(len(every)))


def _listed(forms: str | tuple[str, ...]) -> tuple[str, ...]:
    return (forms,) if isinstance(forms, str) else forms


def ask(facts: Sequence[Fact], seed: int = 0) -> list[Question]:
    """Every fact in every form (never-shown facts not in a shown one), with wrong answers drawn from its relation.

    Raises: DataError when a relation has fewer than four different answers.
    """
    rng, questions = np.random.default_rng(seed), []
    for fact in facts:
        others = sorted({f.answer for f in facts if f.relation == fact.relation} - {fact.answer})
        if len(others) < CHOICES - 1:
            raise DataError(f"{fact.relation}: {len(others)} other answers are too few for {CHOICES} choices")
        wrong = [others[place] for place in rng.choice(len(others), CHOICES - 1, replace=False)]
        for form in FORMS if fact.shown else FORMS[1:]:
            prompt = ASKED[fact.relation][form].format(s=fact.subject)
            questions.append(Question(fact, form, prompt, (fact.answer, *wrong)))
    return questions


@dataclass(frozen=True)
class Sheet:
    """Questions as rows of ids, one an answer, `[Q x 4, T]`, filled on the right; where the answers begin and end in each."""

    questions: tuple[Question, ...]
    ids_RT: np.ndarray
    begin_R: np.ndarray
    end_R: np.ndarray


def sheet_of(questions: Sequence[Question], tokenizer: Tokenizer, fill: int = 0, first: int | None = None) -> Sheet:
    """Questions tokenised: prompt and " answer" apart. first: an id before every prompt, as the training text begins its documents."""
    before = [] if first is None else [first]
    prompts = [before + tokenizer.encode(q.prompt, add_special_tokens=False).ids for q in questions for _ in q.answers]
    answers = [tokenizer.encode(f" {a}", add_special_tokens=False).ids for q in questions for a in q.answers]
    begin_R = np.array([len(prompt) for prompt in prompts])
    end_R = begin_R + np.array([len(answer) for answer in answers])
    ids_RT = np.full((len(prompts), int(end_R.max())), fill, np.int64)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids_RT[row, : len(prompt) + len(answer)] = prompt + answer
    return Sheet(tuple(questions), ids_RT, begin_R, end_R)


@torch.no_grad()
def score(arm: Arm, suffix: Suffix, sheet: Sheet, hidden_RTD: np.ndarray, *, batch: int = 32) -> dict[str, np.ndarray]:
    """Of every question: `chosen` (the right answer is the likeliest of four), `exact` (it is the greedy one), its `nats`.

    hidden_RTD: the sheet's hidden states before the block.
    """
    nats_R, greedy_R = np.zeros(len(sheet.ids_RT)), np.zeros(len(sheet.ids_RT), bool)
    by_length_R = np.argsort(sheet.end_R, kind="stable")
    for chunk in chunks(len(by_length_R), batch):
        rows = by_length_R[chunk]
        ids_BT = torch.from_numpy(sheet.ids_RT[rows, : sheet.end_R[rows].max()])
        hidden_BTD = torch.from_numpy(hidden_RTD[rows, : ids_BT.shape[1]]).to(next(suffix.parameters()).device)
        with arm.begin(ids_BT) or nullcontext() as step:
            normed_BTD = suffix.normed(arm(hidden_BTD, step))
        nats_R[rows], greedy_R[rows] = _answers(suffix, normed_BTD, ids_BT, sheet.begin_R[rows], sheet.end_R[rows])
    nats_QK = nats_R.reshape(-1, CHOICES)
    return {"chosen": nats_QK.argmin(1) == 0, "exact": greedy_R.reshape(-1, CHOICES)[:, 0], "nats": nats_QK[:, 0]}


def _answers(
    suffix: Suffix, normed_BTD: Tensor, ids_BT: Tensor, begin_B: np.ndarray, end_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Nats of every row's answer, and whether greedy decoding gives it; the head reads those positions alone."""
    place_BT = torch.arange(ids_BT.shape[1])
    judged_BT = (place_BT >= torch.from_numpy(begin_B)[:, None]) & (place_BT < torch.from_numpy(end_B)[:, None])
    row_A, place_A = judged_BT.nonzero(as_tuple=True)
    logits_AV = suffix.rest.get_output_embeddings()(normed_BTD[row_A, place_A - 1]).float()
    targets_A = ids_BT[row_A, place_A].to(logits_AV.device)
    nats_A = torch.nn.functional.cross_entropy(logits_AV, targets_A, reduction="none").cpu().numpy()
    right_A = (logits_AV.argmax(-1) == targets_A).cpu().numpy()
    wrong_B = np.bincount(row_A.numpy(), ~right_A, minlength=len(ids_BT))
    return np.bincount(row_A.numpy(), nats_A, minlength=len(ids_BT)), wrong_B == 0


def recall_table(sheet: Sheet, scores: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Means by "relation/known or never/form", and over the relations by "all/...": questions, chosen, exact, nats."""
    table = {}
    for relation in ("all", *TRAINING):
        for shown in (True, False):
            for form in FORMS:
                of_Q = np.array(
                    [
                        q.form == form and q.fact.shown == shown and relation in ("all", q.fact.relation)
                        for q in sheet.questions
                    ]
                )
                if of_Q.any():
                    means = {name: float(values[of_Q].mean()) for name, values in scores.items()}
                    table[f"{relation}/{'known' if shown else 'never'}/{form}"] = {"questions": int(of_Q.sum())} | means
    return table
