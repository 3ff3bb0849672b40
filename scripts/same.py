"""`make same`: 20 tiny training steps of every arm, and the losses compared with a committed text.

A refactor is bitwise: it changes none of these digits. Whoever changes the numbers on purpose rewrites the text with `--write` and
says why in the commit. Another CPU adds in another order: its losses agree closely for a few steps, until a token that two experts
suit about equally goes to the other one, and then to a few hundredths of a nat. There a change is told from a CPU by running this on
the commit before it, on the same machine.
"""

import sys
import tempfile
from pathlib import Path

import torch

from nengram.config import ARMS, load_config
from nengram.text import prepare
from nengram.train import train

COMMITTED = Path(__file__).parent / "same.txt"
ALIKE, NEAR, FAR = 5, 2e-3, 5e-2  # steps before the first token changes its expert; nats up to there, and after


def losses_text() -> str:
    """A line per arm: the losses of 20 steps on the bundled text, in nats."""
    torch.set_num_threads(1)
    config = load_config("demo", ("budget.scale=2", "model.context=64", "train.batch=4", "train.tokens=5120"))
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        data = prepare("bundled", vocab_size=1024, cache_folder=Path(folder) / "cache")
        for arm in ARMS:
            arm_config = config.replace(budget__arm=arm, train__eval_tokens=256)
            losses = [record.loss_nats for record in train(arm_config, data, Path(folder) / arm)]
            lines.append(f"{arm} " + " ".join(f"{loss:.9f}" for loss in losses))
    return "\n".join(lines) + "\n"


def differing(mine: str, committed: str) -> str | None:
    """The first loss that differs by more than another CPU explains, as a sentence, or None."""
    for ours, theirs in zip(mine.splitlines(), committed.splitlines(), strict=True):
        arm, *left = ours.split()
        for step, (a, b) in enumerate(zip(left, theirs.split()[1:], strict=True), 1):
            if abs(float(a) - float(b)) > (NEAR if step <= ALIKE else FAR):
                return f"{arm}, step {step}: {a}, committed {b}"
    return None


def main() -> None:
    """Exit 1 at the first difference. Bitwise where the text was written; elsewhere float32 sums may differ in the last digits."""
    mine = losses_text()
    if "--write" in sys.argv:
        COMMITTED.write_text(mine)
    committed = COMMITTED.read_text()
    if mine == committed:
        print("same: every digit")
    elif first := differing(mine, committed):
        sys.exit(f"not the same: {first}; if meant, rewrite with: python scripts/same.py --write")
    else:
        print(f"same within {NEAR} nats for {ALIKE} steps, within {FAR} after: another CPU or build of torch")


if __name__ == "__main__":
    main()
