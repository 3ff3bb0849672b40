"""An engine with a paged cache, as lists and loops: who is served what, and where it lies. It computes nothing.

Requests come and go, share the blocks of equal beginnings, are served in pieces beside each other in any order, make drafts of which
some are rejected, and are thrown out and begin again; blocks are used anew. Every step gives the flat row that an engine would hand to
its model, and the texts as they are, from which a slow twin reads what came before each token.
"""

from dataclasses import dataclass, field
from random import Random

import torch

from nengram.hf.vllm_history import FlatRow

VOCABULARY = 7  # few ids, so that beginnings are often the same
PIECE, AT_ONCE = 30, 4  # ids of one request in a row, and requests


@dataclass
class Request:
    """A text, of which `served` ids have gone by. `prompt` of its ids were not made by the model."""

    text: list[int]
    prompt: int
    served: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class Served:
    """One step: the row, its ids, the runner's windows, and for every token the text up to and with it (None: padding)."""

    row: FlatRow
    ids_T: torch.Tensor
    window_RW: torch.Tensor  # of prompts only
    whole_RW: torch.Tensor
    texts: list[tuple[int, ...] | None]


class Engine:
    """`step` until you have seen enough. block_size: positions in a block. window: how many ids the runner's windows know."""

    def __init__(self, random: Random, block_size: int, window: int):
        self.random, self.block_size, self.window = random, block_size, window
        self.needed = AT_ONCE * ((PIECE + 3) // block_size + 2)  # blocks that one step may take
        self.blocks = 3 * self.needed
        self.shared: dict[tuple[int, ...], int] = {}  # a block by the text that ends with it
        self.requests: list[Request] = []
        self.free: list[int] = []
        self.hits = self.rejected = 0

    @property
    def slots(self) -> int:
        """Of all blocks."""
        return self.blocks * self.block_size

    def step(self) -> Served:
        """Serve some requests a piece each."""
        if self.requests and self.random.random() < 0.2:
            self._leave(self.random.choice(self.requests), stays=self.random.random() < 0.5)
        for _ in range(self.random.randint(not self.requests, 2)):
            self._admit(Request(self._prompt(), 0))
        self._make_room()
        chosen = self.random.sample(self.requests, self.random.randint(1, min(AT_ONCE, len(self.requests))))
        pieces = [(request, *self._piece(request)) for request in chosen]
        served = self._lay_out(pieces)
        for request, length, drafts in pieces:
            self._go_on(request, length, drafts)
        return served

    def _ids(self, most: int) -> list[int]:
        return [self.random.randrange(VOCABULARY) for _ in range(self.random.randint(1, most))]

    def _prompt(self) -> list[int]:
        known = [request.text[: request.prompt] for request in self.requests] + [list(text) for text in self.shared]
        beginning = self.random.choice(known) if known and self.random.random() < 0.6 else []
        return beginning[: self.random.randint(0, 24)] + self._ids(9)

    def _admit(self, request: Request) -> None:
        """With the blocks of as much of its text as is there, but for its last id."""
        request.prompt = request.prompt or len(request.text)
        request.served, request.blocks = 0, []
        while (end := request.served + self.block_size) < len(request.text):
            block = self.shared.get(tuple(request.text[:end]))
            if block is None:
                break
            request.blocks.append(block)
            request.served, self.hits = end, self.hits + 1
        self.requests.append(request)

    def _leave(self, request: Request, stays: bool) -> None:
        """Done, or thrown out to begin again."""
        self.requests.remove(request)
        if stays:
            self._admit(request)

    def _make_room(self) -> None:
        """Find the free blocks; forget some of what was shared, and the oldest requests, until there are enough."""
        while True:
            used = {block for request in self.requests for block in request.blocks}
            held = used | set(self.shared.values())
            self.free = [block for block in range(1, self.blocks) if block not in held]  # block 0 is nobody's
            if len(self.free) >= self.needed:
                break
            for text in [text for text, block in self.shared.items() if block not in used]:
                if self.random.random() < 0.5:
                    del self.shared[text]
            if len(self.requests) > 1:
                self.requests.pop(0)
        self.random.shuffle(self.free)

    def _piece(self, request: Request) -> tuple[int, int]:
        """How many ids come next, and how many drafts are among them; drafts are written behind the text."""
        left = len(request.text) - request.served
        drafts = self._ids(3) if left == 1 and self.random.random() < 0.5 else []
        request.text += drafts
        length = self.random.randint(1, min(left, PIECE)) + len(drafts)
        while len(request.blocks) * self.block_size < request.served + length:
            request.blocks.append(self.free.pop())
        return length, len(drafts)

    def _go_on(self, request: Request, length: int, drafts: int) -> None:
        accepted = self.random.randint(0, drafts)
        self.rejected += drafts - accepted
        request.served += length - (drafts - accepted)
        del request.text[len(request.text) - (drafts - accepted) :]
        for end in range(self.block_size, request.served + 1, self.block_size):
            self.shared.setdefault(tuple(request.text[:end]), request.blocks[end // self.block_size - 1])
        if request.served == len(request.text):
            request.text.append(self.random.randrange(VOCABULARY))

    def _lay_out(self, pieces: list[tuple[Request, int, int]]) -> Served:
        ids, positions, slots, texts, starts = [], [], [], [], [0]
        for request, length, _ in pieces:
            for at in range(request.served, request.served + length):
                ids.append(request.text[at])
                positions.append(at)
                slots.append(request.blocks[at // self.block_size] * self.block_size + at % self.block_size)
                texts.append(tuple(request.text[: at + 1]))
            starts.append(len(ids))
        for _ in range(self.random.randint(0, 2)):  # padding
            ids, positions, slots, texts = [*ids, 0], [*positions, 0], [*slots, -1], [*texts, None]
        widest = max(len(request.blocks) for request, *_ in pieces) + 1
        tables = [request.blocks + [0] * (widest - len(request.blocks)) for request, *_ in pieces]
        whole = [self._window(request, len(request.text)) for request, *_ in pieces]
        prompts = [self._window(request, request.prompt) for request, *_ in pieces]
        as_int = {"dtype": torch.int32}
        row = FlatRow(
            torch.tensor(positions),
            torch.tensor(starts, **as_int),
            torch.tensor(tables, **as_int),
            torch.tensor(slots),
            self.block_size,
        )
        nobody = [[-1] * self.window]
        window_RW, whole_RW = (torch.tensor(rows + nobody, **as_int) for rows in (prompts, whole))
        return Served(row, torch.tensor(ids), window_RW, whole_RW, texts)

    def _window(self, request: Request, known: int) -> list[int]:
        back = range(request.served - 1, request.served - 1 - self.window, -1)
        return [request.text[at] if 0 <= at < known else -1 for at in back]
