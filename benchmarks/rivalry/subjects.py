"""The two guides that rivals meet on, with their data and what is asked of a student.

all-MiniLM-L6 on single sentences of four novels, padded to the longest of a batch; judged on sentences of two other
novels, and on sentences of Python's documentation, of which nobody trained on any. The demo's GPT-2 on Python's
documentation, whole topics held out.

B batch, T time, D width, V vocabulary, N sentences
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from benchmarks import language
from benchmarks.rivalry import novels
from benchmarks.rivalry.blocks import BERT, GPT2, Layout
from benchmarks.studies.minilm import fidelity, folder
from examples.text import Windows, corpus

Batches = list[Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A guide, and what a student of it is fitted on, chosen by and judged by."""

    name: str
    guide: Any
    layout: Layout
    data: Callable[[int], Batches]  # by seed
    chosen_by: Batches  # rates and states, never told of
    judged: Mapping[str, Batches]  # by domain
    output: Callable[[Any, Any], torch.Tensor]  # (model, batch)
    distance: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]  # own, the guide's, batch
    task: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]  # without the guide, where there are labels
    seen: Callable[[torch.Tensor, Any], torch.Tensor]  # (x_BTD, batch) -> the tokens that are no padding, as rows
    figures: Callable[[list[torch.Tensor], list[torch.Tensor], Batches], dict[str, float]]
    compile: Mapping[str, Any]  # what thesean.compile is told besides
    inputs: Callable[[Any], dict[str, torch.Tensor]]  # of a batch, by name
    steps: int
    speedup: float
    context: int
    known: dict[int, tuple[Batches, list[torch.Tensor]]] = field(default_factory=dict)

    @torch.no_grad()
    def of_guide(self, batches: Batches) -> list[torch.Tensor]:
        """The guide's outputs on batches that are judged by again and again."""
        if id(batches) not in self.known:
            self.known[id(batches)] = batches, [self.output(self.guide, batch) for batch in batches]
        return self.known[id(batches)][1]


class SentenceEncoder(nn.Module):
    """(input_ids_BT, attention_mask_BT) -> embedding_BD: the mean over a sentence's own tokens, normalised."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden_BTD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        seen_BT1 = attention_mask.unsqueeze(-1).to(hidden_BTD.dtype)
        return F.normalize((hidden_BTD * seen_BT1).sum(1) / seen_BT1.sum(1), dim=-1)


def sentences(text: str) -> list[str]:
    """Of at least four words and at most 400 characters, each once."""
    found = (re.sub(r"\s+", " ", s).strip() for s in re.split(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]*[A-Z])", text))
    return list(dict.fromkeys(s for s in found if s.count(" ") >= 3 and len(s) <= 400))


def encoded(tokenizer: Any, texts: list[str], size: int, seed: int = 0) -> Batches:
    """Padded to the longest of each batch, which is of sentences of like length: four batches at a time are sorted."""
    made, pick = [], random.Random(seed)
    for k in range(0, len(texts), 4 * size):
        alike = sorted(texts[k : k + 4 * size], key=len)
        few = [alike[i : i + size] for i in range(0, len(alike), size)]
        pick.shuffle(few)
        for some in few:
            batch = tokenizer(some, padding=True, truncation=True, max_length=128, return_tensors="pt")
            made.append({name: batch[name] for name in ("input_ids", "attention_mask")})
    return made


def _relative(own_BD: torch.Tensor, guide_BD: torch.Tensor, _: Any) -> torch.Tensor:
    """Squared error in units of the guide's variance over the batch, as Thesean compares what is no classes."""
    return (own_BD - guide_BD).square().sum() / (guide_BD - guide_BD.mean(0)).square().sum()


def _of_embeddings(own: list[torch.Tensor], guide: list[torch.Tensor], _: Batches) -> dict[str, float]:
    return fidelity(torch.cat(own), torch.cat(guide))


def minilm(settings: Mapping[str, Any]) -> Subject:
    """The pretrained encoder and real sentences; in the quick form a small one with random weights, random tokens."""
    size, count = settings["sentences"], settings["judged"]
    if settings["small"]:
        guide, data, chosen_by, judged = _small(size, count)
    else:
        guide, data, chosen_by, judged = _pretrained(size, count, settings["steps"])
    return Subject(
        name="all-MiniLM-L6",
        guide=guide,
        layout=BERT,
        data=data,
        chosen_by=chosen_by,
        judged=judged,
        output=lambda model, batch: model(**batch),
        distance=_relative,
        task=_relative,
        seen=lambda x_BTD, batch: x_BTD[batch["attention_mask"].bool()],
        figures=_of_embeddings,
        compile={},
        inputs=dict,
        steps=settings["steps"],
        speedup=settings["speedup"],
        context=settings["context"],
    )


def _pretrained(size: int, count: int, steps: int) -> tuple[Any, Callable[[int], Batches], Batches, dict[str, Batches]]:
    from transformers import AutoModel, AutoTokenizer

    guide = SentenceEncoder(AutoModel.from_pretrained(folder(), add_pooling_layer=False, dtype=torch.float32)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder())
    books = {title: sentences(text) for title, text in novels.novels().items()}
    read = [s for title, found in books.items() if title not in novels.HELD_OUT for s in found]
    unread = [s for title in novels.HELD_OUT for s in books[title]]
    documentation = [s for text in topics.values() for s in sentences(text)]
    pick = random.Random(0)
    pick.shuffle(read)
    kept_back, read = read[: 6 * size], read[6 * size :]
    judged = {
        "books": encoded(tokenizer, pick.sample(unread, count), size),
        "documentation": encoded(tokenizer, pick.sample(documentation, count), size),
    }

    def data(seed: int) -> Batches:
        return encoded(tokenizer, random.Random(seed).sample(read, max(96, steps) * size), size, seed)

    return guide, data, encoded(tokenizer, kept_back, size), judged


def _small(size: int, count: int) -> tuple[Any, Callable[[int], Batches], Batches, dict[str, Batches]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    guide = SentenceEncoder(BertModel(config, add_pooling_layer=False)).eval()

    def drawn(seed: int, batches: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for _ in range(batches):
            lengths_B = torch.randint(4, 13, (size,), generator=generator)
            mask_BT = (torch.arange(12) < lengths_B.unsqueeze(1)).long()
            made.append({"input_ids": torch.randint(1, 64, (size, 12), generator=generator), "attention_mask": mask_BT})
        return made

    held = drawn(1, max(2, count // size))
    return guide, lambda seed: drawn(seed + 2, 4), held, {"books": held, "documentation": drawn(99, len(held))}


def _softened(own_BTV: torch.Tensor, guide_BTV: torch.Tensor, batch: Any) -> torch.Tensor:
    """A tenth of the task's loss and nine tenths of the guide's logits at temperature 2 (Hinton et al. 2015)."""
    apart = F.kl_div(
        (own_BTV / 2).log_softmax(-1).flatten(0, 1),
        (guide_BTV / 2).log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    return 0.1 * _nats(own_BTV, guide_BTV, batch) + 0.9 * 4 * apart


def _nats(own_BTV: torch.Tensor, _: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(own_BTV.flatten(0, 1), batch[1].flatten())


def _of_logits(own: list[torch.Tensor], guide: list[torch.Tensor], batches: Batches) -> dict[str, float]:
    tokens = lost = apart = 0.0
    for mine_BTV, theirs_BTV, batch in zip(own, guide, batches, strict=True):
        lost += F.cross_entropy(mine_BTV.flatten(0, 1), batch[1].flatten(), reduction="sum").item()
        known = theirs_BTV.log_softmax(-1)
        apart += (known.exp() * (known - mine_BTV.log_softmax(-1))).sum().item()
        tokens += batch[1].numel()
    return {"nats": lost / tokens, "divergence": apart / tokens}


def demo(settings: Mapping[str, Any]) -> Subject:
    """The demo's language model; the batches that rates are chosen by are other windows of what it was trained on."""
    sizes = {"steps": settings["steps"], "batch": settings["batch"], "length": settings["context"]}
    chosen_by = list(Windows(corpus(held_out=False), batches=4, batch=8, length=sizes["length"], seed=1000))
    guide = language.guide(settings["layers"])
    guide.config.use_cache = False
    return Subject(
        name="the demo's GPT-2",
        guide=guide,
        layout=GPT2,
        data=lambda seed: list(language.windows(sizes, seed)),
        chosen_by=chosen_by,
        judged={"topics": language.held_out(sizes["length"], settings["every"])},
        output=lambda model, batch: model(input_ids=batch[0]).logits,
        distance=_softened,
        task=_nats,
        seen=lambda x_BTD, batch: x_BTD.flatten(0, 1),
        figures=_of_logits,
        compile={"loss": thesean.cross_entropy},
        inputs=lambda batch: {"input_ids": batch[0]},
        steps=sizes["steps"],
        speedup=settings["speedup"],
        context=sizes["length"],
    )


@torch.no_grad()
def judge(subject: Subject, model: Any, batches: Batches) -> dict[str, float]:
    """The figures of a model on some batches; a callable that gives outputs serves as well."""
    own = [subject.output(model, batch) for batch in batches]
    return subject.figures(own, subject.of_guide(batches), batches)


@torch.no_grad()
def far(subject: Subject, model: Any, batches: Batches) -> float:
    """The mean distance from the guide."""
    theirs = subject.of_guide(batches)
    apart = [subject.distance(subject.output(model, b), g, b).item() for b, g in zip(batches, theirs, strict=True)]
    return sum(apart) / len(apart)
