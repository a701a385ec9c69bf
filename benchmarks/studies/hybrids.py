"""What does a hybrid lose with its last attentions, and what does it win? Of recurrences and one attention in four.

Two guides of four layers, trained on the demo's text first and kept in build/: gated delta rules as Qwen3.5 has them,
and Mamba 2's state spaces as Granite 4 has them, each with an attention last, whose cache is all that grows with the
context. In closed form: that attention by `rnn`, by a window, by a recurrence that copies nothing, left out; and the
recurrences replaced too. Then served, guide and conversion in turns: one more token after so many.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import thesean
from benchmarks import language
from benchmarks.positions import trained
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown, mean_and_ends
from examples.text import ALPHABET
from thesean.deploy.timing.latency import latency_of_models

Target = thesean.Target


def _sizes(layers: int, width: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "vocab_size": len(ALPHABET), "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 16384, "use_cache": False, "tie_word_embeddings": True,
        "initializer_range": 0.05, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


def delta_rules(layers: int, width: int) -> Any:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        **_sizes(layers, width), intermediate_size=8 * width // 3, head_dim=width // 4, linear_num_key_heads=4,
        linear_num_value_heads=4, linear_key_head_dim=width // 4, linear_value_head_dim=width // 4,
        layer_types=["linear_attention"] * (layers - 1) + ["full_attention"],
    )  # fmt: skip
    return Qwen3_5ForCausalLM(config)


def state_spaces(layers: int, width: int) -> Any:
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        **_sizes(layers, width), intermediate_size=8 * width // 3, shared_intermediate_size=8 * width // 3,
        num_local_experts=0, mamba_n_heads=8, mamba_d_head=width // 4, mamba_n_groups=1, mamba_d_state=width // 4,
        mamba_chunk_size=64, position_embedding_type="rope", layer_types=["mamba"] * (layers - 1) + ["attention"],
    )  # fmt: skip
    return GraniteMoeHybridForCausalLM(config)


GUIDES: dict[str, tuple[Callable[[int, int], Any], str]] = {
    "delta rules": (delta_rules, "*linear_attn"), "state spaces": (state_spaces, "*mamba")
}  # fmt: skip
TARGETS: dict[str, Any] = {
    "rnn": "rnn",
    "rnn, 32 held": Target("rnn", window=16, kept=16),
    "window of 28 and 4 sinks": Target("sliding", window=28, sinks=4),
    "mingru": "mingru",
    "left out": {"*self_attn": "identity"},
    "rnn, recurrences too": "all",
}


def bench(run: Run) -> None:
    settings = run.settings
    held_out = language.held_out(settings["length"], settings["every"])
    for guide, (build, memories) in GUIDES.items():
        rows = {f"{guide}: {name}": target for name, target in TARGETS.items()}
        wanted = [(name, seed) for name in rows for seed in run.seeds if run.wants(name, seed)]
        served = run.wants(f"{guide}: served")
        if not wanted and not served:
            continue
        model = trained(f"hybrids-{guide.replace(' ', '-')}", build, settings)
        for name, seed in wanted:
            target = {memories: "rnn", "*self_attn": "rnn"} if rows[name] == "all" else rows[name]
            recipe = language.recipe("fast")
            run.add(name, seed, **language.convert(model, settings, held_out, seed, recipe, target=target))
        if served:
            run.add(f"{guide}: served", None, **serve(model, settings))


def serve(model: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a prefill and of one more token, guide and conversion in turns."""
    data = language.windows(settings, 0)
    converted = thesean.compile(
        model, TARGETS["rnn, 32 held"], data=data, recipe="fast", granularity="sublayer", progress=False
    )
    contexts = settings["contexts"]
    with tempfile.TemporaryDirectory() as folder:
        networks = {"guide": converted.frontier[0], "rnn": converted}
        paths = {name: network.export(Path(folder) / f"{name}.onnx").path for name, network in networks.items()}
        found = latency_of_models(paths, converted.signature, contexts=contexts, batch=1)
    return {f"{name}_{key}": ms for name, each in found.items() for key, ms in each.medians_ms().items()}


def table(result: Result) -> str:
    """Losses of both guides side by side, and what a token takes."""
    cases, contexts = result["cases"], result["settings"]["contexts"]
    lost = {(c["name"], c["seed"]): c for c in cases if "loss" in c}
    body = []
    for name in TARGETS:
        found = [[c["loss"] for (row, _), c in lost.items() if row == f"{guide}: {name}"] for guide in GUIDES]
        body.append([name, *(mean_and_ends(losses, 3) for losses in found)])
    guides = [next((c["guide"] for (row, _), c in lost.items() if row.startswith(guide)), None) for guide in GUIDES]
    body.insert(0, ["guide", *("-" if loss is None else f"{loss:.3f}" for loss in guides)])
    lines = markdown(["closed form", *GUIDES], body)
    served = {guide: next((c for c in cases if c["name"] == f"{guide}: served"), None) for guide in GUIDES}
    rows = [
        [f"{guide}: {who}", *(f"{row[f'{name}_token_{c}']:.2f}" for c in contexts)]
        for guide, row in served.items()
        if row is not None
        for name, who in (("guide", "guide"), ("rnn", "rnn, 32 held"))
    ]
    return "\n".join([*lines, "", *markdown(["ms a token after", *map(str, contexts)], rows)])


CASE = Case(
    question="What does a hybrid lose with its last attentions, and what does it win?",
    minutes=40,
    unit="nats a character, ms a token",
    run=bench,
    seeds=(0, 1, 2),
    settings={
        "steps": 16, "batch": 4, "length": 256, "every": 4, "layers": 4, "width": 128, "guide_steps": 1200,
        "contexts": [64, 2048, 8192],
    },
    quick={
        "batch": 2, "length": 32, "every": 80, "layers": 2, "width": 32, "guide_steps": 2, "contexts": [8],
    },
    quick_only=("delta rules: rnn, 32 held", "delta rules: served"),
    needs=("transformers", "onnxruntime"),
    table=table,
)  # fmt: skip
