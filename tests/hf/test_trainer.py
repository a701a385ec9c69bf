"""transformers' Trainer trains a converted network further, with what its graph keeps for the backward or without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.hf.test_folder import bounded
from tests.live import Kept
from thesean import hf
from thesean.hf.modeling import TheseanForCausalLM

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 20, (12,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def trained(folder: Path, steps: int, resume: bool = False, **settings: Any) -> tuple[TheseanForCausalLM, list[float]]:
    network = hf.from_converted(bounded("model.layers.0"))
    asked = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_steps=2, lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model=network, args=asked, train_dataset=rows(8))
    trainer.train(resume_from_checkpoint=resume or None)
    return network, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_training_goes_on_from_its_checkpoint_and_is_a_folder_of_ours(tmp_path: Path):
    whole, losses = trained(tmp_path / "whole", 4)
    assert losses[-1] < losses[0] - 0.1
    trained(tmp_path / "halves", 2)
    halves, again = trained(tmp_path / "halves", 4, resume=True)
    assert again == losses
    assert models.same_state(halves, models.state_of(whole))
    loaded = hf.from_pretrained(tmp_path / "halves" / "checkpoint-4")
    assert models.same_state(loaded.network, models.state_of(whole.network))


def test_gradient_checkpointing_trains_the_same_bits(tmp_path: Path):
    plain, losses = trained(tmp_path / "plain", 3)
    anew, again = trained(tmp_path / "anew", 3, activation_checkpointing=True)
    assert again == losses
    assert models.same_state(anew, models.state_of(plain))
    assert set(anew.state_dict()) == set(plain.state_dict())


def test_gradient_checkpointing_keeps_less_where_it_is_on_and_trains_alone():
    network = hf.from_converted(bounded("model.layers.0"))
    ids = torch.randint(0, 20, (8, 64))

    def kept(training: bool) -> int:
        network.train(training)
        with Kept(network.state_dict(keep_vars=True).values()) as found:
            network(input_ids=ids, labels=ids)
        return found.bytes

    plain, evaluated = kept(True), kept(False)
    network.activation_checkpointing_enable()
    kept(True)  # finds its regions
    assert kept(True) < 0.8 * plain
    assert kept(False) == evaluated
    other = copy.deepcopy(network).train()
    other(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in network.parameters())
    assert any(p.grad is not None for p in other.parameters())
    network.activation_checkpointing_disable()
    assert kept(True) == plain
