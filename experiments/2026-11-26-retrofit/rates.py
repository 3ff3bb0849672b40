"""Which rates does a graft want? Its layer's and its table's, apart: the retrofit itself moves both by one dial.

    python experiments/2026-11-26-retrofit/rates.py           every pair on the tuning tokens, judged on dev text; resumable
    python experiments/2026-11-26-retrofit/rates.py --bias    the same with biases in the layer's projections, zero at the start
    python experiments/2026-11-26-retrofit/rates.py --lora-lr 3e-3 --lr 1e-2 --table-lr 1    graft and LoRA, each at a rate of its own

One line of rates.jsonl for each, and a table of what there is at the end. Text, sizes and seed are those of the retrofit's tuning. A
look at dev text by one seed, for choosing defaults; no verdict.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from run import as_program, prepare, say, with_hidden

from nengram.hf.arms import Arm, make_arm
from nengram.hf.retrofit import by_source, train_arm, window_nats
from nengram.hf.retrofit_runs import TUNING_SEED, append_row, read_rows
from nengram.memory import Engram
from nengram.store import make_rule
from nengram.train import RowOptimizer, environment

HERE = Path(__file__).parent
LR, TABLE_LR = (1e-3, 3e-3, 1e-2), (0.3, 1.0, 3.0)


def main(given: list[str]) -> None:
    """What is not in the file yet, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", nargs="+", type=float, default=list(LR))
    parser.add_argument("--table-lr", nargs="+", type=float, default=list(TABLE_LR))
    parser.add_argument("--bias", action="store_true")
    parser.add_argument(
        "--lora-lr", type=float, default=0.0, help="of a LoRA that has half of the graft's numbers; 0: none"
    )
    parser.add_argument("--model", default="data/smollm2")
    parser.add_argument("--out", type=Path, default=HERE / "rates.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs/retrofit"), help="folder of hidden states")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    whole = {"arms": ["graft"], "seeds": [0], "tokens": 100_352, "rates": [1e-3], "rows": 20_000}
    design, suffix, cids_V, text, name = prepare(argparse.Namespace(**vars(arguments) | whole))
    material = with_hidden(text, suffix, name, arguments.work)
    kind = {"bias": arguments.bias, "lora_lr": arguments.lora_lr}
    done = {(row["lr"], row["table_lr"]) for row in read_rows(arguments.out) if kind_of(row) == kind}
    for pair in ((lr, table_lr) for lr in arguments.lr for table_lr in arguments.table_lr):
        if pair in done:
            continue
        rates, ids_NT = dict(zip(("lr", "table_lr"), pair, strict=True)), material.train.ids_NT[:, :-1]
        how = {"tokens": design.tuning_tokens, "batch": design.batch, "seed": TUNING_SEED}
        with make_arm(
            "graft_lora" if arguments.lora_lr else "graft", suffix, cids_V, ids_NT, sizes=design.sizes, seed=TUNING_SEED
        ) as arm:
            if arguments.bias:
                add_biases(arm.memory.engram)
            if arguments.lora_lr:
                arm.optimizers = partial(two_rates, arm, arguments.lora_lr)
            train_arm(arm, suffix, material.train, **rates, **how)
            dev = by_source(window_nats(arm, suffix, material.dev), material.dev.sources)
        nats = float(np.mean(list(dev.values())))
        append_row(arguments.out, rates | kind | {"dev_nats": nats, "dev": dev, "environment": environment()})
        say(f"lr {pair[0]:g}, table {pair[1]:g}: {nats:.3f} nats")
    rows = read_rows(arguments.out)
    for known in {tuple(kind_of(row).items()): None for row in rows}:
        print(", ".join(f"{name} {value:g}" for name, value in known))
        print_table([row for row in rows if tuple(kind_of(row).items()) == known])


def kind_of(row: dict) -> dict:
    """What a table is of."""
    return {"bias": row["bias"], "lora_lr": row["lora_lr"]}


def two_rates(arm: Arm, lora_lr: float, lr: float, table_lr: float) -> tuple[list, list[float]]:
    """As `Arm.optimizers`, LoRA at a rate of its own."""
    parts = ((arm.lora, lora_lr), (arm.memory, lr))
    found = [torch.optim.AdamW(part.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0) for part, rate in parts]
    table = RowOptimizer(make_rule("rowwise_adagrad"), table_lr)
    return [*found, table], [lora_lr, lr, table_lr]


def add_biases(engram: Engram) -> None:
    """To both projections, zero."""
    for projection in (engram.key_proj, engram.value_proj):
        projection.bias = torch.nn.Parameter(torch.zeros(projection.out_features))


def print_table(rows: list[dict]) -> None:
    """Mean dev nats by the layer's rate (down) and the table's (across)."""
    nats = {(row["lr"], row["table_lr"]): row["dev_nats"] for row in rows}
    across = sorted({table_lr for _, table_lr in nats})
    print(f"{'lr, table':>10}" + "".join(f"{table_lr:10g}" for table_lr in across))
    for lr in sorted({lr for lr, _ in nats}):
        print(f"{lr:10g}" + "".join(f"{nats[lr, t]:10.3f}" if (lr, t) in nats else f"{'-':>10}" for t in across))


if __name__ == "__main__":
    as_program(main)
