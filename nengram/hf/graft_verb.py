"""What `nengram graft` does: train a memory on a local model and a local text, and say what it is worth.

The held-out text is judged before, with the memory, with the memory switched off, and with each rival in its place (`graft_arms`): what
one row a slot keeps of the gain did not come from looking anything up, and what LoRA gains is what the same parameters do elsewhere.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nengram.errors import CheckpointError, ConfigError
from nengram.files import write_atomic
from nengram.hf.adapter import save_adapter
from nengram.hf.blocks import anatomy
from nengram.hf.graft_arms import Arm, GraftPlan, LoraArm, MemoryArm
from nengram.hf.graft_run import held_out_nats, train
from nengram.hf.grafting import grafted
from nengram.hf.hooks import SITE, Graft
from nengram.hf.loading import opened
from nengram.hf.lora import linears_of
from nengram.model.folder import is_saved
from nengram.text import Prepared, prepare

RIVALS = ("one_row", "lora")
TOLD_EVERY = 10  # steps, where there is no terminal to draw on


def run_graft(
    where: Path,
    text: str,
    out: Path,
    plan: GraftPlan,
    *,
    doc_token: str = "",
    rivals: Sequence[str] = RIVALS,
    eval_tokens: int = 20_000,
    resume: bool = False,
    device: str = "auto",
    console: Console,
) -> dict[str, float]:
    """Train, judge, print, and leave the adapter in `out`; the losses in nats a token, by arm.

    where: local folder of a causal model of transformers, with its tokenizer.json. text: a file or folder that `read_corpus` knows.
    rivals: of `RIVALS`, each of which takes the graft's time again. eval_tokens: of the test split that are judged; 0: all.
    A schedule that trains the model too leaves it in `<out>-model`. Raises: ConfigError, DataError, CheckpointError, in one line.
    """
    work = out.with_name(f"{out.name}-training")
    if is_saved(out):
        raise CheckpointError(f"{out}: holds an adapter already; choose another --out, or delete it")
    if any((work / arm).exists() for arm in ("graft", *RIVALS)) and not resume:
        raise CheckpointError(f"{work}: holds an unfinished run; continue it with --resume, or delete it")
    if not (where / "tokenizer.json").is_file():
        raise ConfigError(f"{where}: has no tokenizer.json, which an n-gram's address depends on")
    data = prepare(
        text, tokenizer_path=where / "tokenizer.json", doc_token=doc_token or None, cache_folder=work / "cache"
    )
    judge = {"batch": plan.batch, "context": plan.context, "tokens": eval_tokens}
    losses: dict[str, float] = {}
    parameters: dict[str, int] = {}
    names = ["graft", *rivals]
    for name in names:
        dtype = "auto" if plan.schedule == "memory" else "float32"
        with opened(where, device=device, dtype=dtype) as one:
            if name == "graft":
                losses["before"] = held_out_nats(one.model, data.splits["test"], **judge)
                _print_plan(one.model, data, plan, where, console)
                if "lora" in names and (reason := _no_lora(one.model, plan)):
                    console.print(f"no LoRA beside it: {reason}", highlight=False)
                    names.remove("lora")
            arm = _arm(name, one, plan, parameters.get("graft", 0))
            _train(name, arm, data, plan, work / name, resume=resume, console=console)
            losses[name] = held_out_nats(one.model, data.splits["test"], **judge)
            if name == "lora":
                parameters["lora"] = sum(parameter.numel() for parameter in arm.learning(1.0))
            if name == "graft":
                parameters["graft"] = _parameters(grafted(one.model))
                with grafted(one.model).disabled():
                    losses["off"] = held_out_nats(one.model, data.splits["test"], **judge)
                if plan.schedule != "memory":
                    _save_model(one, out.with_name(f"{out.name}-model"))
                facts = {"losses_nats": losses, "steps": plan.steps_of(data), "text": data.digest}
                save_adapter(one.model, work / "result", facts=facts)
    _print_losses(losses, data, parameters, console)
    (work / "result").rename(out)
    shutil.rmtree(work)
    sizes = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    console.print(
        f"{out}: {sizes:.1f} MiB; nengram.hf.load_adapter(model, {str(out)!r})", highlight=False, soft_wrap=True
    )
    return losses


def kept_share(losses: Mapping[str, float]) -> float | None:
    """What part of the gain over the model before the one-row control has too; None without a control or a gain."""
    gain = losses["before"] - losses["graft"]
    return (losses["before"] - losses["one_row"]) / gain if "one_row" in losses and gain > 0 else None


def _arm(name: str, one: Any, plan: GraftPlan, parameters: int) -> Arm:
    if name == "lora":
        return LoraArm(one.model, plan, parameters)
    return MemoryArm(one.model, one.tokenizer, plan, "hashed" if name == "graft" else name)


def _no_lora(model: Any, plan: GraftPlan) -> str:
    """Why LoRA cannot be a rival, if it cannot."""
    if plan.schedule != "memory":
        return f"in schedule {plan.schedule} the model itself learns"
    return "" if linears_of(anatomy(model).blocks) else f"the blocks of a {type(model).__name__} have no linear modules"


def _parameters(owner: Graft) -> int:
    """Numbers that learn in a memory, tables included."""
    dense = sum(parameter.numel() for module in owner.layers().values() for parameter in module.parameters())
    return dense + sum(store.num_rows * store.row_width for store in owner.adapter().stores.values())


def _train(
    name: str, arm: Arm, data: Prepared, plan: GraftPlan, folder: Path, *, resume: bool, console: Console
) -> None:
    columns = (
        TextColumn(name),
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("graft", total=None, rate="")
        for record in train(arm, data, plan, folder, resume=resume):
            rate = f"loss {record.loss_nats:.3f}  {record.tokens_per_s:,.0f} tokens/s"
            progress.update(bar, completed=record.step, total=record.steps, rate=rate)
            if not console.is_terminal and record.step % TOLD_EVERY == 0:
                left = (record.steps - record.step) * plan.batch * plan.context / record.tokens_per_s
                console.print(f"{name}: step {record.step}/{record.steps}  {rate}  {left:,.0f} s left", highlight=False)


def _print_plan(model: Any, data: Prepared, plan: GraftPlan, where: Path, console: Console) -> None:
    own = sum(parameter.numel() for parameter in model.parameters())
    tokens = ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    console.print(
        f"{where}: {type(model).__name__}, {own:,} parameters; tokens: {tokens}", highlight=False, soft_wrap=True
    )
    steps, one_pass = plan.steps_of(data), (len(data.splits["train"]) - 1) // (plan.batch * plan.context)
    if steps > one_pass:
        console.print(
            f"[bold]note[/]: {steps} steps are more than one pass ({one_pass} steps): from the second on rows answer for text that "
            "they have seen, so go by the held-out loss"
        )


def _print_losses(losses: Mapping[str, float], data: Prepared, parameters: Mapping[str, int], console: Console) -> None:
    table = Table(title=f"held-out text, {len(data.splits['test']):,} tokens", title_justify="left")
    table.add_column("")
    for heading in ("nats a token", "against before"):
        table.add_column(heading, justify="right")
    names = {
        "before": "before",
        "graft": f"with the memory, {parameters['graft']:,} parameters",
        "off": "memory switched off",
        "one_row": "one-row control",
    }
    names |= {"lora": f"LoRA, {parameters.get('lora', 0):,} parameters"}
    for arm, name in names.items():
        if arm in losses:
            table.add_row(
                name, f"{losses[arm]:.4f}", f"{losses[arm] - losses['before']:+.4f}" if arm != "before" else ""
            )
    console.print(table)
    kept = kept_share(losses)
    if kept is not None:
        console.print(f"the one-row control, which looks nothing up, keeps {kept:.0%} of the gain", highlight=False)
    elif "one_row" in losses:
        console.print("no gain on held-out text: fewer or shorter steps, another --table-lr, or more text")
    if "lora" in losses:
        apart = losses["graft"] - losses["lora"]
        told = "better" if apart < 0 else "worse"
        console.print(
            f"the memory is {abs(apart):.4f} nats {told} than LoRA, at rates that were searched for neither: one run, no verdict",
            highlight=False,
        )


def _save_model(one: Any, folder: Path) -> None:
    """The model that learned along, without the memory, and its tokenizer."""
    own = {name: tensor for name, tensor in one.model.state_dict().items() if f"{SITE}." not in name}
    one.model.save_pretrained(folder, state_dict=own)
    write_atomic(folder / "tokenizer.json", one.tokenizer.backend_tokenizer.to_str())
