"""lm-eval asks conversions as it asks any model of transformers, and their files in onnxruntime-genai, and finds what
they say themselves. Its tasks are local; `datasets` is real here.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import thesean.hf
from tests.captured import shared
from tests.hf.converted import PAD, bounded, counted, placed, tokenizer
from thesean.errors import MissingExtraError

pytest.importorskip("lm_eval")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # its own and datasets'
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

AROUND = {"test_split": "test", "fewshot_split": "test", "doc_to_text": "{{asked}}", "num_fewshot": 0}
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{asked}}",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
        ],
    },
    "generate": {
        "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["<pad>"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


def rows() -> list[dict[str, Any]]:
    drawn = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{drawn.randrange(20)}" for _ in range(count))

    return [
        {"asked": words(drawn.randrange(2, 9)), "choices": [words(2) for _ in range(3)], "right": drawn.randrange(3)}
        for _ in range(8)
    ]


def tasks(folder: Path) -> list[Any]:
    """As a user's folder has them: a file of rows, and a task as a file for each."""
    folder.joinpath("rows.jsonl").write_text("\n".join(map(json.dumps, rows())), encoding="utf-8")
    files = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    return [
        {**AROUND, **task, "task": name, "dataset_path": "json", "dataset_kwargs": files}
        for name, task in TASKS.items()
    ]


def evaluated(model: Any, folder: Path, **arguments: Any) -> dict[str, list[Any]]:
    """Task -> what the model said of each row."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments |= {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}  # reads 13,000 files else
    found = simple_evaluate(model, tasks=tasks(folder), log_samples=True, **arguments)
    assert found is not None
    samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}
    return {name: [row["filtered_resps"] for row in rows] for name, rows in samples.items()}


@torch.no_grad()
def log_likelihood(network: Any, context: str, continuation: str) -> float:
    read = tokenizer()
    before, after = (read(text)["input_ids"] for text in (context, continuation))
    told_TV = network(input_ids=torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
    return sum(float(told_TV[len(before) - 1 + i, token]) for i, token in enumerate(after))


@shared
def by_hand(of: Any) -> dict[str, list[Any]]:
    network, read = thesean.hf.from_converted(of()), tokenizer()
    said: dict[str, list[Any]] = {name: [] for name in TASKS}
    for row in rows():
        said["choice"].append([log_likelihood(network, row["asked"], choice) for choice in row["choices"]])
        said["rolling"].append(log_likelihood(network, "<pad>", row["asked"]))
        ids = read(row["asked"], return_tensors="pt")["input_ids"]
        more = network.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=PAD)
        said["generate"].append(read.decode(more[0, ids.shape[1] :]))
    return said


def same(found: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    told = [[likelihood for likelihood, _ in row] for row in found["choice"]]
    torch.testing.assert_close(torch.tensor(told), torch.tensor(wanted["choice"]), atol=1e-4, rtol=0)
    rolled = [row[0] for row in found["rolling"]]
    torch.testing.assert_close(torch.tensor(rolled), torch.tensor(wanted["rolling"]), atol=1e-4, rtol=0)
    written = [(row[0].strip(), text) for row, text in zip(found["generate"], wanted["generate"], strict=True)]
    whole = [(said, text) for said, text in written if "<" not in text]  # else it depends on who stops there
    assert len(whole) > 3
    assert all(said == text for said, text in whole)


def ending() -> Any:
    made = tokenizer()
    made.eos_token = "<pad>"
    return made


@pytest.mark.parametrize("of", [bounded, counted, placed], ids=lambda of: of.__name__)
def test_a_conversion_is_evaluated_in_batches_of_unequal_rows(of: Any, tmp_path: Path):
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=thesean.hf.from_converted(of()), tokenizer=ending(), backend="causal", batch_size=3)
    same(evaluated(model, tmp_path), by_hand(of))


def test_a_folder_is_evaluated_by_its_name(tmp_path: Path):
    thesean.hf.save_pretrained(bounded(), tmp_path / "hub", tokenizer=ending())
    asked = f"pretrained={tmp_path / 'hub'},device=cpu"
    same(evaluated("hf", tmp_path, model_args=asked, batch_size=2), by_hand(bounded))


def test_the_file_that_is_served_says_the_same(tmp_path: Path):
    bounded().export(tmp_path / "served", runtime="genai", tokenizer=ending())
    asked = f"pretrained={tmp_path / 'served'}"
    same(evaluated("onnxruntime-genai", tmp_path, model_args=asked, batch_size=1), by_hand(bounded))


@pytest.mark.slow
def test_the_command_knows_folders_of_conversions(tmp_path: Path):
    thesean.hf.save_pretrained(bounded(), tmp_path / "hub", tokenizer=ending())
    for task in tasks(tmp_path):
        tmp_path.joinpath(f"{task['task']}.yaml").write_text(json.dumps(task), encoding="utf-8")
    words = ["run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'hub'}", "--device", "cpu"]
    words += ["--include_path", str(tmp_path), "--tasks", "choice", "--output_path", str(tmp_path / "told.json")]
    subprocess.run([sys.executable, "-m", "thesean.hf.lm_eval", *words], check=True, capture_output=True)
    (told,) = tmp_path.glob("told*.json")
    best = [max(range(3), key=row.__getitem__) for row in by_hand(bounded)["choice"]]
    right = sum(said == row["right"] for said, row in zip(best, rows(), strict=True)) / len(best)
    assert json.loads(told.read_text())["results"]["choice"]["acc,none"] == right


def test_where_it_is_missing_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    from thesean.hf.lm_eval import main

    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(MissingExtraError, match=r"lm-eval.*\[eval\]"):
        main()
