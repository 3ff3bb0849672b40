"""What is asked, and why: every boundary of an address, once, in settings small enough to read.

Answers come from `nengram.address.reference`, plain integers, never from a fast path. Ids are made by a fixed mixing function, so the
files are the same on every machine; `scripts/conformance.py` writes them and a test holds them to this.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from nengram.address import AddressSpec, reference
from nengram.address.dialects import splitmix64
from nengram.conform.bugs import end_of
from nengram.conform.classes import class_cases
from nengram.conform.vectors import Case, Setting, Vectors

MAKERS = {"engram": AddressSpec.engram, "deepseek_v41": AddressSpec.deepseek_v41, "qwen_ple": AddressSpec.qwen_ple}

Call = dict[str, list]
Asked = tuple[str, str, list[Call]]


def generate(dialect: str) -> Vectors:
    """All questions of a dialect, answered by the reference."""
    classes = () if dialect == "qwen_ple" else class_cases()
    return Vectors(dialect, tuple(_setting(dialect, *parts) for parts in SETTINGS[dialect]), classes)


def answered(setting_spec: AddressSpec, calls: Sequence[Call]) -> tuple[dict[str, list], ...]:
    """The rows of every call, by layer id: each sequence hashed whole by the reference, then cut where the calls were."""
    lengths = [len(call["ids"][0]) for call in calls]
    whole = {field: _joined(calls, field) for field in ("ids", "starts", "blocked")}
    rows = {str(layer.layer_id): _rows(setting_spec, layer, whole) for layer in setting_spec.layers}
    edges = [sum(lengths[:at]) for at in range(len(calls) + 1)]
    return tuple(
        {layer_id: [sequence[a:b] for sequence in rows_BTS] for layer_id, rows_BTS in rows.items()}
        for a, b in zip(edges, edges[1:], strict=False)
    )


def _joined(calls: Sequence[Call], field: str) -> list[list]:
    blank = [[[False] * len(ids) for ids in call["ids"]] for call in calls]
    parts = [call.get(field, missing) for call, missing in zip(calls, blank, strict=True)]
    return [sum((part[b] for part in parts), []) for b in range(len(calls[0]["ids"]))]


def _rows(spec: AddressSpec, layer: Any, whole: dict[str, list]) -> list[list[list[int]]]:
    return [
        reference.table_rows(
            ids,
            multipliers=layer.multipliers,
            moduli=layer.moduli,
            pad_cid=spec.pad_cid,
            starts=starts,
            blocked=blocked,
            end_cid=end_of(spec.end_cid),
        )
        for ids, starts, blocked in zip(whole["ids"], whole["starts"], whole["blocked"], strict=True)
    ]


def _setting(
    dialect: str, name: str, covers: str, asked: str, parameters: dict[str, Any], lookup: tuple = (), pad_id: int = -1
) -> Setting:
    parameters = _defaults(MAKERS[dialect]) | parameters
    spec = MAKERS[dialect](**parameters)
    questions = ASKED[asked](spec)
    cases = tuple(Case(one, why, tuple(calls), answered(spec, calls)) for one, why, calls in questions)
    return Setting(name, covers, parameters, spec, pad_id if pad_id >= 0 else spec.pad_cid, lookup, cases)


def _defaults(maker: Callable[..., AddressSpec]) -> dict[str, Any]:
    """What a constructor takes if it is not told otherwise: written out, since a stranger does not know it."""
    given = {name: one.default for name, one in inspect.signature(maker).parameters.items()}
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return {name: value for name, value in told.items() if value not in (inspect.Parameter.empty, None)}


def ids_of(spec: AddressSpec, length: int, seed: int) -> list[int]:
    """Made-up ids, never the pad id: where pad stands, the question is about pad."""
    vocab, pad = spec.compressed_vocab_size, spec.pad_cid
    made = (splitmix64(seed * 1_000_003 + t) % vocab for t in range(length))
    return [cid if cid != pad else (cid + 1) % vocab for cid in made]


def one_call(*sequences: list[int], **flags: list[int]) -> list[Call]:
    """One call of these sequences; flags are positions at which they are true, the same in every sequence."""
    call: Call = {"ids": list(sequences)}
    for name, places in flags.items():
        call[name] = [[t in places for t in range(len(ids))] for ids in sequences]
    return [call]


def in_calls(call: Call, lengths: Sequence[int]) -> list[Call]:
    """The same call cut into several, the last taking what is left."""
    edges = [sum(lengths[:at]) for at in range(len(lengths) + 1)]
    edges = [edge for edge in edges if edge < len(call["ids"][0])] + [len(call["ids"][0])]
    return [
        {field: [sequence[a:b] for sequence in values] for field, values in call.items()}
        for a, b in zip(edges, edges[1:], strict=False)
    ]


def plain(spec: AddressSpec) -> list[Asked]:
    """Ids only."""
    pad, last, order = spec.pad_cid, spec.compressed_vocab_size - 1, spec.max_order
    ids = ids_of(spec, 12, 1)
    return [
        ("one token", "everything before it is pad", one_call(ids[:1])),
        ("two tokens", "shorter than the longest n-gram", one_call(ids[:2])),
        ("as many tokens as the longest n-gram", "the last position is the first without pad", one_call(ids[:order])),
        ("one token more than that", "the first id falls out of the window", one_call(ids[: order + 1])),
        ("40 tokens", "the plain run of a text", one_call(ids_of(spec, 40, 2))),
        ("all pad", "a text of nothing but the id that also fills", one_call([pad] * (order + 1))),
        ("genuine pad inside", "the pad id in a text is an id like any other, except where it ends a text",
         one_call([*ids[:3], pad, *ids[3:6], pad, pad, *ids[6:9]])),
        ("one id again and again", "equal ids under different multipliers", one_call([ids[0]] * (order + 2))),
        ("all zero", "products are zero", one_call([0] * (order + 1))),
        ("largest id", "the largest product that there is", one_call([last] * (order + 1))),
        ("smallest and largest id", "both ends of the range by turns", one_call([0, last] * 3, [last, 0] * 3)),
        ("right padding", "a batch filled up with pad on the right is hashed like text",
         one_call(ids[:8], [*ids[8:11], *[pad] * 5])),
        ("batch of unequal contents", "sequences do not see each other", one_call(*(ids_of(spec, 6, s) for s in (3, 4, 5)))),
    ]  # fmt: skip


def barriers(spec: AddressSpec) -> list[Asked]:
    """Document starts and blocked positions."""
    ids = ids_of(spec, 11, 6)
    hidden = [-1 if t in (4, 5) else cid for t, cid in enumerate(ids)]
    return [
        ("start at the first position", "changes nothing", one_call(ids[:5], starts=[0])),
        ("start inside", "sees itself and nothing before", one_call(ids, starts=[5])),
        ("starts one after another", "documents of one token", one_call(ids, starts=[3, 4, 5])),
        ("start at the last position", "its own document", one_call(ids, starts=[10])),
        ("blocked inside", "a barrier: later windows do not look beyond it", one_call(ids, blocked=[4])),
        ("blocked span of -1", "ids of blocked positions are never read", one_call(hidden, blocked=[4, 5])),
        ("blocked at the first position", "", one_call(ids[:5], blocked=[0])),
        ("blocked at the last position", "its own slots all read pad", one_call(ids[:5], blocked=[4])),
        ("all blocked", "every slot reads pad", one_call(ids[:4], blocked=[0, 1, 2, 3])),
        ("start and blocked at one position", "blocked wins there", one_call(ids, starts=[4], blocked=[4])),
        ("start after blocked", "both barriers side by side", one_call(ids, starts=[5], blocked=[4])),
        ("blocked after start", "", one_call(ids, starts=[4], blocked=[5])),
    ]


def streams(spec: AddressSpec) -> list[Asked]:
    """Several calls that go on where the last one ended."""
    ids, other = ids_of(spec, 10, 7), ids_of(spec, 10, 8)
    call = one_call(ids, other)[0]
    start, blocked = one_call(ids, starts=[4])[0], one_call(ids, blocked=[3])[0]
    return [
        ("token by token", "decoding", in_calls(one_call(ids)[0], [1] * 9)),
        ("in chunks of two", "chunks shorter than what is remembered", in_calls(one_call(ids)[0], [2] * 4)),
        ("prompt, then tokens", "a long chunk and short ones", in_calls(one_call(ids)[0], [7, 1, 1])),
        ("a batch in chunks", "each sequence remembers its own", in_calls(call, [3, 4])),
        ("start at the first position of a chunk", "forgets what was remembered", in_calls(start, [4, 3])),
        ("start before the end of a chunk", "is remembered", in_calls(start, [5, 1])),
        ("blocked at the end of a chunk", "is remembered", in_calls(blocked, [4, 1])),
    ]


def ends(spec: AddressSpec) -> list[Asked]:
    """The end-of-text id, which the Qwen dialect also fills with."""
    end, ids = spec.pad_cid, ids_of(spec, 10, 9)
    inside = [*ids[:3], end, *ids[3:7]]
    return [
        ("end inside", "it sees its own text, what follows does not", one_call(inside)),
        ("end twice in a row", "a text of nothing between them", one_call([*ids[:3], end, end, *ids[3:6]])),
        ("end three times in a row", "", one_call([ids[0], end, end, end, *ids[1:4]])),
        ("end first", "", one_call([end, *ids[:4]])),
        ("end last", "", one_call([*ids[:4], end])),
        ("end by turns", "", one_call([ids[0], end, ids[1], end, ids[2], end])),
        ("ends at different places of a batch", "", one_call([ids[0], end, *ids[1:4]], [*ids[4:7], end, ids[7]])),
        ("end as the last of a chunk", "what is remembered is nothing", in_calls(one_call(inside)[0], [4, 2])),
        ("end as the first of a chunk", "it still sees its text", in_calls(one_call(inside)[0], [3, 1, 1])),
        ("end inside, token by token", "", in_calls(one_call(inside)[0], [1] * 7)),
    ]


def negatives(spec: AddressSpec) -> list[Asked]:
    """Ids below zero enter the product as they are in the public demo, and the modulus floors: no row is negative.

    Only where no product leaves 64 bits: beyond that the demo wraps, which is nobody's intention.
    """
    ids = ids_of(spec, 6, 10)
    return [
        ("-100 inside", "the label of ignored positions, hashed by mistake", one_call([*ids[:2], -100, *ids[2:5]])),
        ("-1 inside", "", one_call([*ids[:3], -1, *ids[3:6]])),
        ("all negative", "", one_call([-1, -2, -3, -100])),
    ]


def few(spec: AddressSpec) -> list[Asked]:
    """What is left to ask where numbers are large: the ends of the range, and one text."""
    pad, last, order = spec.pad_cid, spec.compressed_vocab_size - 1, spec.max_order
    ids = ids_of(spec, 10, 11)
    return [
        ("one token", "everything before it is pad", one_call(ids[:1])),
        ("ten tokens", "the plain run of a text", one_call(ids)),
        ("largest id", "the largest product that there is", one_call([last] * (order + 1))),
        ("ends of the range", "", one_call([0, last, last - 1, 0, 1, last])),
        ("all pad", "", one_call([pad] * 2)),
    ]


ASKED = {
    "all": lambda spec: [*plain(spec), *barriers(spec), *streams(spec)],
    "all, ends": lambda spec: [*plain(spec), *ends(spec), *streams(spec), *barriers(spec)],
    "few": few,
    "few, negatives": lambda spec: [*few(spec), *negatives(spec)],
    "few, ends": lambda spec: [*few(spec), *ends(spec)[:2], *ends(spec)[-1:]],
    "public": lambda spec: [
        ("0 to 19", "the public vectors' first question", one_call(list(range(20)))),
        ("one token", "everything before it is pad", one_call([5])),
    ],
}

# raw ids 5, 11, 17, ... are other spellings of the id five before them: 60 raw ids, 50 compressed ones; raw pad 11 is compressed 5
_LOOKUP = tuple(5 * (raw // 6) + raw % 6 if raw % 6 < 5 else 5 * (raw // 6) for raw in range(60))
_SMALL = {"compressed_vocab_size": 50, "heads": 2, "pad_cid": _LOOKUP[11], "seed": 3}

SETTINGS: dict[str, list[tuple]] = {
    "engram": [
        (
            "small",
            "every boundary; raw and compressed ids differ, multipliers are beyond 2^53",
            "all",
            _SMALL | {"rows_per_head": [97, 101], "layer_ids": [1, 3]},
            _LOOKUP,
            11,
        ),
        (
            "layers not ascending",
            "primes are handed out in the order of the list, multipliers by the id",
            "few",
            _SMALL | {"rows_per_head": [200, 200], "layer_ids": [7, 2, 4]},
            _LOOKUP,
            11,
        ),
        (
            "orders to 4, unequal sizes",
            "the numbers of the public vectors",
            "public",
            {"compressed_vocab_size": 1000, "rows_per_head": [1000, 2000, 1000], "heads": 4}
            | {"layer_ids": [0, 3, 7], "pad_cid": 0, "seed": 1234},
        ),
        (
            "bigrams only, one head",
            "a nominal size that is prime is taken itself; the numbers of the public vectors",
            "public",
            {
                "compressed_vocab_size": 1000,
                "rows_per_head": [97],
                "heads": 1,
                "layer_ids": [2],
                "pad_cid": 3,
                "seed": 42,
            },
        ),
        (
            "the public demo",
            "its sizes and compressed vocabulary, and what it does with ids below zero",
            "few, negatives",
            {
                "compressed_vocab_size": 98_627,
                "rows_per_head": [646_400] * 2,
                "heads": 8,
                "layer_ids": [1, 15],
                "pad_cid": 2,
            },
        ),
        (
            "two ids",
            "the smallest vocabulary: multipliers near 2^61",
            "few",
            {"compressed_vocab_size": 2, "rows_per_head": [50, 50], "heads": 2, "layer_ids": [0], "pad_cid": 1},
        ),
        (
            "largest vocabulary",
            "ids to 2^31 - 2: products need 63 bits, doubles would round them",
            "few",
            {
                "compressed_vocab_size": 2**31 - 1,
                "rows_per_head": [1000, 1000],
                "heads": 2,
                "layer_ids": [0, 9],
                "pad_cid": 2,
            },
        ),
    ],
    "deepseek_v41": [
        (
            "small",
            "every boundary, orders to 4, raw and compressed ids differ",
            "all",
            _SMALL | {"rows_per_head": 100, "max_order": 4, "layer_ids": [1, 3]},
            _LOOKUP,
            11,
        ),
        ("DeepSeek-V4.1-Flash", "the released sizes: 384,006,168 and 384,016,682 rows", "few", {}),
        (
            "two ids",
            "the smallest vocabulary: multipliers near 2^61",
            "few",
            {"compressed_vocab_size": 2, "rows_per_head": 50, "heads": 2, "layer_ids": [0], "pad_cid": 1},
        ),
        (
            "largest vocabulary",
            "ids to 2^31 - 2: products need 63 bits, doubles would round them",
            "few",
            {"compressed_vocab_size": 2**31 - 1, "rows_per_head": 1000, "heads": 2, "layer_ids": [0, 9]},
        ),
    ],
    "qwen_ple": [
        (
            "small",
            "every boundary, two layers",
            "all, ends",
            {"vocab_size": 50, "eos_id": 7, "ple_layer_ids": [1, 3], "rows_per_head": 90, "heads": 2, "seed": 1234},
        ),
        (
            "orders to 4",
            "what is remembered is three ids",
            "few, ends",
            {"vocab_size": 1000, "eos_id": 3, "ple_layer_ids": [2, 3, 9], "rows_per_head": 101, "max_order": 4}
            | {"heads": 3, "divisible_by": 64, "seed": 5},
        ),
        ("Qwen3.8-Flash-Next", "the released sizes: 320,001,536 rows", "few, ends", {"ple_layer_ids": [2]}),
        (
            "two ids",
            "the smallest vocabulary: multipliers near 2^61",
            "few, ends",
            {"vocab_size": 2, "eos_id": 1, "ple_layer_ids": [1], "rows_per_head": 50, "heads": 2},
        ),
        (
            "largest vocabulary",
            "ids to 2^31 - 2: products need 63 bits, doubles would round them",
            "few, ends",
            {"vocab_size": 2**31 - 1, "eos_id": 2, "ple_layer_ids": [1, 2], "rows_per_head": 1000, "heads": 2},
        ),
    ],
}
"""By dialect: name, what it is for, which questions, parameters, and where ids are compressed the lookup and the raw pad id."""
