"""The verbs beside transformers: memory grafted onto its models, ours served and written as its own."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from nengram.cli.terminal import Into, Tables, results_folder, terminal
from nengram.config import TableOptions


def graft(
    model: Positional[Path],
    /,
    text: str,
    out: Path,
    blocks: tuple[int, ...] = (1,),
    rows: int = 4096,
    max_order: int = 3,
    heads: int = 4,
    row_width: int = 32,
    compress: bool = True,
    steps: int = 0,
    batch: int = 4,
    context: int = 128,
    lr: float = 3e-3,
    base_lr: float = 1e-4,
    table_lr: float = 1.0,
    schedule: Literal["memory", "first", "full"] = "memory",
    lora_lr: float = 3e-3,
    rivals: tuple[Literal["one_row", "lora"], ...] = ("one_row", "lora"),
    seed: int = 0,
    eval_tokens: int = 20_000,
    doc_token: str = "",
    device: str = "auto",
    checkpoint_every: int = 50,
    resume: bool = False,
) -> None:
    """Train a memory onto a local model of transformers, and its rivals beside it: what is the lookup worth?

    Args:
        model: local folder of a causal model, with its tokenizer.json.
        text: .txt or .jsonl file, or a folder; or "bundled".
        out: folder of the adapter.
        blocks: zero-based blocks that read a memory.
        rows: of each head and order.
        max_order: n-grams of 2 up to so many tokens.
        heads: hash heads of each order.
        row_width: numbers in a row.
        compress: look up spellings of one word as one (by the tokenizer); --no-compress hashes ids as they are.
        steps: of the optimiser; one pass over the text if 0.
        batch: sequences per step.
        context: tokens of a sequence.
        lr: of the memory's parameters.
        base_lr: of the model's, where they learn.
        table_lr: of the tables.
        schedule: what learns: the memory, the memory first and then both, or both.
        lora_lr: of the rival LoRA.
        rivals: what else is trained, to be compared with: one row a slot, which looks nothing up; LoRA of as many parameters.
        seed: of hash, weights and the order of the text.
        eval_tokens: held-out tokens that are judged; 0: all.
        doc_token: the token that separates documents, where it cannot be guessed.
        device: where the model is, e.g. cuda; "auto": an accelerator if there is one.
        checkpoint_every: steps between checkpoints.
        resume: continue from the last checkpoint, exactly.
    """
    from nengram.hf.graft_arms import GraftPlan
    from nengram.hf.graft_verb import run_graft

    sizes = {"blocks": blocks, "rows_per_head": (rows,) * (max_order - 1), "heads": heads, "row_width": row_width}
    rates = {"lr": lr, "base_lr": base_lr, "table_lr": table_lr, "lora_lr": lora_lr, "schedule": schedule}
    lengths = {"steps": steps, "batch": batch, "context": context, "checkpoint_every": checkpoint_every}
    plan = GraftPlan(sizes | {"compress": compress}, seed=seed, **rates, **lengths)
    how = {"doc_token": doc_token, "rivals": rivals, "eval_tokens": eval_tokens, "resume": resume, "device": device}
    run_graft(model, text, results_folder(out), plan, **how, console=terminal())


def serve(
    run: Positional[Path],
    /,
    adapter: tuple[Path, ...] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    continuous_batching: bool = False,
    tables: Tables = TableOptions(),  # noqa: B008 - frozen
) -> None:
    """Answer OpenAI-style requests, whole or streamed: /v1/completions, /v1/chat/completions.

    Args:
        run: run folder, or folder of transformers.
        adapter: folders of memories and LoRAs to put on the model.
        host: address to listen on; others than this machine reach it at 0.0.0.0.
        port: to listen on; 0: any that is free.
        device: where the model is, e.g. cuda; "auto": an accelerator if there is one.
        continuous_batching: refused: it packs requests into one row, and a memory would look back into the wrong one.
        tables: where the tables are read from.
    """
    from nengram.hf.serve import run_serve

    how = {"adapters": adapter, "host": host, "port": port, "device": device}
    console = terminal(stderr=True)
    run_serve(run, **how, continuous_batching=continuous_batching, tables=tables, console=console)


def export(run: Positional[Path], into: Positional[Into], /) -> None:
    """Write a finished run as a folder of transformers: AutoModelForCausalLM, AutoTokenizer and their tools open it.

    Args:
        run: run folder.
        into: the folder; one that an earlier export wrote is replaced, whole or not at all.
    """
    from nengram.hf.export import export

    folder = export(run, results_folder(into))
    terminal().print(f"{folder}: import nengram.hf, then AutoModelForCausalLM.from_pretrained({str(folder)!r})")
