"""`make gpu`: what has only been tried on the CPU, tried on a CUDA device. Writes benchmarks/results/gpu.json.

Addresses on the device must equal those on the CPU exactly; 20 training steps of the MoE and the Engram arm must give losses within
0.01 nats of the CPU's. Then, and only then, tokens per second are taken. `--device cpu` runs the script itself without a device.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from nengram.config import load_config
from nengram.files import write_atomic
from nengram.model import resolve
from nengram.text import prepare
from nengram.train import build_model, environment, train

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu.json"
STEPS, TOLERANCE = 20, 0.01


def main(device: str) -> None:
    """Exit 1 with one line when there is no device, or when it disagrees with the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; nothing was run")
    config = load_config("demo", (f"train.tokens={STEPS * 1024}", "train.eval_tokens=1024"))
    with tempfile.TemporaryDirectory() as folder:
        data = prepare("bundled", vocab_size=4096, cache_folder=Path(folder) / "cache")
        check_addresses(config, data, device)
        figures = {arm: check_arm(config, data, arm, device, Path(folder)) for arm in ("moe", "engram")}
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    result = {
        "what": f"{STEPS} training steps of the demo's arms on a device, losses against the CPU's",
        "command": "make gpu",
        "environment": environment() | {"device": name},
        "figures": figures,
    }
    print(json.dumps(result, indent=1))
    if device != "cpu":
        write_atomic(RESULT, json.dumps(result, indent=1) + "\n")


def check_addresses(config, data, device: str) -> None:
    """The rows of one batch, computed on the device, against those of the CPU."""
    resolved = resolve(config.replace(budget__arm="engram"), data.tokenizer.get_vocab_size())
    ids_BT = torch.from_numpy(data.splits["test"].ids_N[: 8 * 128].astype("int64")).view(8, 128)
    rows = []
    for place in ("cpu", device):
        model = build_model(resolved.replace(train__device=place), data)
        rows.append(model.addresser(model.cids_V[ids_BT.to(place)]))
    for layer_id, rows_BTS in rows[0].items():
        if not torch.equal(rows_BTS, rows[1][layer_id].cpu()):
            sys.exit(f"addresses of layer {layer_id} on {device} differ from the CPU's")


def check_arm(config, data, arm: str, device: str, folder: Path) -> dict:
    """Losses on the CPU and on the device, and the device's tokens per second of wall time."""
    losses, seconds = [], 0.0
    for place in ("cpu", device):
        placed = config.replace(budget__arm=arm, train__device=place)
        began = time.perf_counter()
        losses.append([record.loss_nats for record in train(placed, data, folder / f"{arm}-{place}-{len(losses)}")])
        seconds = time.perf_counter() - began
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    if apart > TOLERANCE:
        sys.exit(f"{arm}: a loss on {device} is {apart:.4f} nats from the CPU's")
    return {"largest_loss_difference_nats": apart, "tokens_per_s": STEPS * 1024 / seconds}


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("--device") + 1] if "--device" in sys.argv else "cuda")
