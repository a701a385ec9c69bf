"""Train the demo's guide: a character-level GPT-2 of 0.84 M parameters, and write it to a folder.

    python -m examples.train_guide --out build/guide --minutes 20

The copy in `examples/guide` was made by this script; `train.log` beside it is what it printed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from examples.text import ALPHABET, Windows, corpus, held_out_windows

CONFIG = dict(
    vocab_size=len(ALPHABET), n_positions=256, n_embd=128, n_layer=4, n_head=4,
    resid_pdrop=0.05, embd_pdrop=0.05, attn_pdrop=0.05, initializer_range=0.08,
    use_cache=False, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


@torch.no_grad()
def validation_loss(model: GPT2LMHeadModel) -> float:
    """Nats per held-out character."""
    model.eval()
    total = count = 0.0
    for x, y in held_out_windows():
        total += F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        count += y.numel()
    model.train()
    return total / count


def save(model: GPT2LMHeadModel, folder: Path) -> None:
    """Hugging Face's layout, fp16: half the size, and the loss agrees to four digits."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/guide"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = GPT2LMHeadModel(GPT2Config(**CONFIG)).train()
    tokens = corpus(held_out=False)
    print(f"parameters {sum(p.numel() for p in model.parameters())}, training characters {len(tokens)}", flush=True)

    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    start, budget, best, step = time.monotonic(), options.minutes * 60, math.inf, 0
    for x, y in Windows(tokens, batches=10**9, batch=8, seed=options.seed):
        elapsed = time.monotonic() - start
        if elapsed > budget:
            break
        rate = 3e-3 * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * elapsed / budget)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 250 == 0:
            held_out = validation_loss(model)
            print(f"step {step} seconds {elapsed:.0f} train {loss.item():.4f} held out {held_out:.4f}", flush=True)
            if held_out < best:
                best = held_out
                save(model, options.out)
    final = validation_loss(model)
    if final < best:
        best = final
        save(model, options.out)
    result = {"steps": step, "seconds": round(time.monotonic() - start), "held_out_nats": round(best, 4)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
