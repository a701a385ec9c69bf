"""A saved folder is data, whoever wrote it: what a hostile one says is refused at load, by ArtifactError alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import models
from tests.models import tokens, vectors
from tests.test_artifact import converted

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted().save(tmp_path_factory.mktemp("honest") / "saved")


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "saved"))


def rewrite(folder: Path, change: Change) -> None:
    """Alter graph.json and give it a checksum that fits, as an attacker would."""
    document = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    document.pop("sha256")
    change(document)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (folder / "graph.json").write_text(json.dumps({"sha256": digest, **document}), encoding="utf-8")


def named(path: Any) -> Change:
    return lambda document: document["signature"].update(output_class=path)


@pytest.mark.parametrize(
    "path",
    [
        "shelve.DbfilenameShelf",  # unpickles the file that its first argument names
        "collections.ChainMap", "os.environ", "tests.test_strict_loading.Own", "builtins.dict", "", "x",
        "transformers.modeling_outputs.nn.Module",
        "transformers.modeling_outputs.dataclass", "transformers.models.bert.modeling_bert.BertModel",
        "transformers.models.nothing.modeling_nothing.Output", "transformers.utils.ModelOutput",
    ],
)  # fmt: skip
def test_a_class_that_is_not_one_of_transformers_outputs_is_a_dict(path, folder: Path):
    rewrite(folder, named(path))
    with torch.no_grad():
        output = thesean.load(folder)(tokens(2, 5))
    assert type(output) is dict


@dataclass
class Own:
    hidden: torch.Tensor


torch.export.register_dataclass(Own)


class ReturnsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> Own:
        return Own(hidden=self.layers(x))


def test_a_class_of_ones_own_is_kept_as_long_as_the_guide_is_at_hand_and_is_a_dict_once_loaded(tmp_path: Path):
    data = [vectors(4, 8, seed=k) for k in range(4)]
    made = thesean.compile(models.seeded(ReturnsOwn), "mlp", data=data, recipe="fast", progress=False)
    assert type(made(data[0])) is Own
    loaded = thesean.load(made.save(tmp_path / "saved"))
    assert torch.equal(loaded(data[0])["hidden"], made(data[0]).hidden)
    assert thesean.load(loaded.save(tmp_path / "again")).signature == made.signature


def test_one_of_transformers_outputs_is_that_again(folder: Path):
    assert type(thesean.load(folder)(tokens(2, 5))).__name__ == "CausalLMOutputWithCrossAttentions"
    rewrite(folder, named("transformers.models.clip.modeling_clip.CLIPOutput"))
    with pytest.raises(thesean.errors.ArtifactError, match="output_class"):
        thesean.load(folder)  # it has no logits
