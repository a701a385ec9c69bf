"""B batch, T time, D width"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import captured, models
from tests.models import tokens, vectors
from thesean import artifact, load_artifact, replace_folder
from thesean.artifact import Artifact
from thesean.errors import ArtifactError
from thesean.passes.graph.nodes import attribute
from thesean.passes.graph.signature import Bound, InputSpec
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.report.conversion import ConversionReport
from thesean.targets import Target

NEEDED = {"graph.json", "weights.safetensors", "plan.yaml", "report.json"}
FILES = NEEDED | {"example.safetensors"}


@cache
def converted(guide: Any = captured.gpt2, target: str = "gru", window: int | None = None) -> thesean.Converted:
    """An untrained hybrid with a report of its own: what is saved does not depend on training."""
    bound_plan = make_plan(guide(), target if window is None else Target(target, window=window))
    torch.manual_seed(0)
    hybrid = build_hybrid(bound_plan)
    hybrid.graph_module.eval()
    report = ConversionReport(
        guide={"loss": 1.0}, converted={"loss": None}, stages=(), steps=3, seconds=0.5, params=7, flops=8,
        train_length=10, recipe={"name": "custom"}, seed=0, notes=("a note",), copied={"h": ["query"]},
    )  # fmt: skip
    return thesean.Converted(hybrid.graph_module, guide().signature, bound_plan.plan, report)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return converted().save(tmp_path / "saved")


@pytest.mark.parametrize(
    ("guide", "target"),
    [
        (captured.gpt2, "gru"),
        (captured.gpt2, "linear-attention"),
        (captured.gpt2, "delta"),
        (captured.gpt2, "ssm"),
        (captured.gpt2, "reservoir"),
        (captured.bert, "delta"),
        (captured.bert, "gru"),
        (captured.bert, "lstm"),
        (captured.encoder, "ssm"),
        (captured.encoder, "reservoir"),
        (captured.bert, "mingru"),
        (captured.llama, "rnn"),
        (captured.encoder, "lstm"),
        (captured.resnet, "mlp"),
        (captured.functional, "mlp"),
        (captured.tied, "mlp"),
        (captured.gpt2, "conv"),
        (captured.gpt2, "linear"),
        (captured.gpt2, "identity"),
        (captured.resnet, "conv"),
        (captured.resnet, "resnet-block"),
        (captured.resnet, "linear"),
        (captured.fixed_length, "mixer"),
    ],
)
def test_a_loaded_conversion_computes_the_same_bit_for_bit(guide, target, tmp_path):
    original = converted(guide, target)
    loaded = thesean.load(original.save(tmp_path / "saved"))
    for sizes in ((2, 7), (1, 3)):
        symbols = guide().signature.symbols
        inputs = guide().signature.random_inputs({s: sizes[0 if s.startswith("batch") else 1] for s in symbols})
        with torch.no_grad():
            expected, actual = original(**inputs), loaded(**inputs)
        assert type(actual) is type(expected)
        torch.testing.assert_close(
            torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), rtol=0, atol=0
        )
    assert loaded.plan == original.plan
    assert loaded.report == original.report
    assert loaded.signature == original.signature


@pytest.mark.parametrize("guide", [captured.gpt2, captured.llama])
def test_a_window_and_groups_of_queries_come_back_from_a_saved_conversion(guide, tmp_path):
    original = converted(guide, "linear-attention", 3)
    loaded = thesean.load(original.save(tmp_path / "saved"))
    ids = tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, original(ids).logits, rtol=0, atol=0)
    assert loaded.plan == original.plan


def test_the_guides_class_and_configuration_are_kept_as_data(saved: Path):
    told = thesean.load(saved).signature.guide
    assert told is not None
    assert told == converted().signature.guide
    assert told.record is None  # nothing of it was imported
    assert told.path == "transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel"
    assert told.config["n_layer"] == 2
    rewrite(saved, lambda document: document.pop("guide"))  # as versions before wrote it
    assert thesean.load(saved).signature.guide is None


def test_tied_weights_are_saved_once_and_stay_tied(saved: Path):
    loaded, original = thesean.load(saved), converted()
    assert len(list(loaded.module.parameters())) == len(list(original.module.parameters()))
    ids = tokens(2, 5)
    before = loaded(ids).logits
    table = next(p for p in loaded.module.parameters() if p.shape == (models.VOCABULARY, 16))
    with torch.no_grad():
        table.mul_(0)
    after = loaded(ids).logits
    assert not torch.equal(before, after)
    assert torch.equal(after, torch.zeros_like(after))  # the head is the table


def test_a_loaded_conversion_can_be_trained_and_saved_again(saved: Path, tmp_path: Path):
    loaded = thesean.load(saved)
    assert not loaded.module.training
    loss = loaded(tokens(2, 5)).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None for p in loaded.module.part_0.parameters())
    again = thesean.load(loaded.save(tmp_path / "again"))
    assert models.same_state(again.module, loaded.module.state_dict())


def test_the_folder_holds_five_readable_files_and_nothing_pickled(saved: Path):
    assert {p.name for p in saved.iterdir()} == FILES
    assert {p.name for p in saved.parent.iterdir()} == {"saved"}
    for name in ("graph.json", "report.json"):
        json.loads((saved / name).read_text(encoding="utf-8"))
    assert thesean.Plan.from_yaml(saved / "plan.yaml") == converted().plan


def test_it_is_loaded_in_a_new_process_without_the_guide_and_without_transformers(saved: Path, tmp_path: Path):
    script = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "pickle5", "onnx", "onnxruntime"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import torch
torch.set_num_threads(1)
import thesean
converted = thesean.load(sys.argv[1])
assert "transformers" not in sys.modules
output = converted(torch.load(sys.argv[2], weights_only=True))
assert isinstance(output, dict), type(output)
torch.save(output["logits"].detach(), sys.argv[3])
"""
    ids, theirs = tmp_path / "ids.pt", tmp_path / "logits.pt"
    torch.save(tokens(2, 7), ids)
    root = Path(thesean.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script, str(saved), str(ids), str(theirs)],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(torch.load(theirs), converted()(tokens(2, 7)).logits.detach(), rtol=0, atol=0)


def rewrite(folder: Path, change) -> None:
    """Alter graph.json and give it a checksum that fits, as an attacker would."""
    document = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    document.pop("sha256")
    change(document)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (folder / "graph.json").write_text(json.dumps({"sha256": digest, **document}), encoding="utf-8")


def test_rewriting_without_a_change_loads(saved: Path):
    rewrite(saved, lambda document: None)
    thesean.load(saved)


def test_an_operator_outside_of_the_allow_list_is_refused_even_with_the_right_checksum(saved: Path, tmp_path: Path):
    mark = tmp_path / "mark"

    def change(document):
        row = next(r for r in document["nodes"] if r["op"] == "call_function")
        row |= {"target": "os.system", "args": [f"touch {mark}"], "kwargs": {}}

    rewrite(saved, change)
    with pytest.raises(ArtifactError, match=r"operator 'os\.system' is outside of the allow-list"):
        thesean.load(saved)
    assert not mark.exists()


def change_module(document):
    next(iter(document["modules"].values()))["target"] = "os"


def change_config(document):
    next(iter(document["modules"].values()))["config"]["width"] = 3


def change_config_key(document):
    next(iter(document["modules"].values()))["config"]["__class__"] = 3


def drop_modules(document):
    document["modules"] = {}


def change_path(document):
    next(r for r in document["nodes"] if r["op"] == "get_attr")["target"] = "transformer.nothing"


def change_dtype(document):
    document["signature"]["inputs"][0]["dtype"] = "load"


def change_input(document):
    document["signature"]["inputs"][0]["surprise"] = 1


def drop_signature(document):
    del document["signature"]


def drop_modules_key(document):
    del document["modules"]


def drop_aliases(document):
    del document["aliases"]


def drop_symbols(document):
    del document["symbols"]


def drop_checksums(document):
    del document["files_sha256"]


def nest_deeply(document):
    value: list = []
    for _ in range(900):
        value = [value]
    document["nodes"][-1]["value"] = value


def change_aliases(document):
    document["aliases"] = {"a.b": "transformer.nowhere.weight"}


def aliases_list(document):
    document["aliases"] = ["a"]


def modules_list(document):
    document["modules"] = ["part_0"]


def module_string(document):
    document["modules"] = {"part_0": "gru"}


def alias_dunder(document):
    document["aliases"] = {"__class__": next(iter(document["nodes"]))["name"]}


def change_guide(document):
    document["guide"] = {"path": ["os", "system"], "config": {}}


def change_guide_key(document):
    document["guide"]["surprise"] = 1


def change_format(document):
    document["format"] = 99


@pytest.mark.parametrize(
    "change",
    [
        change_module, change_config, change_config_key, drop_modules, change_path, change_dtype, change_input,
        drop_signature, drop_modules_key, drop_aliases, drop_symbols, drop_checksums, nest_deeply,
        change_aliases, aliases_list,
        modules_list, module_string, alias_dunder, change_format, change_guide, change_guide_key,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_altered_documents_are_refused_even_with_the_right_checksum(change, saved: Path):
    rewrite(saved, change)
    with pytest.raises(thesean.TheseanError):
        thesean.load(saved)


def test_an_altered_document_does_not_match_its_checksum(saved: Path):
    text = (saved / "graph.json").read_text(encoding="utf-8")
    document = json.loads(text)
    document["symbols"] = {"s0": "other"}
    (saved / "graph.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ArtifactError, match="does not match its checksum"):
        thesean.load(saved)


def test_a_flipped_byte_in_the_weights_is_found(saved: Path):
    path = saved / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"weights\.safetensors does not match its checksum"):
        thesean.load(saved)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", sorted(FILES))
def test_truncated_files_are_refused(name, share, saved: Path):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(thesean.TheseanError):
        thesean.load(saved)


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_that_are_something_else_are_refused(name, saved: Path):
    for content in (b"\xff\xfe\x00\x01", b"[]", b"3", b"{}", b"null"):
        (saved / name).write_bytes(content)
        with pytest.raises(thesean.TheseanError):
            thesean.load(saved)


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_a_missing_file_is_named(name, saved: Path):
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        thesean.load(saved)


def test_a_loaded_conversion_makes_up_inputs_like_the_examples_of_its_guide(saved: Path):
    sizes = {"batch": 2, "time": 5}
    made = converted().signature.random_inputs(sizes)["input_ids"]
    assert torch.equal(thesean.load(saved).signature.random_inputs(sizes)["input_ids"], made)
    (saved / "example.safetensors").unlink()  # inputs may be private
    loaded = thesean.load(saved)
    assert loaded.signature.inputs[0].example is None
    assert loaded(made).logits.shape[:2] == (2, 5)


def test_a_folder_that_is_not_there_or_is_a_file_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match="missing"):
        thesean.load(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="missing"):
        thesean.load(tmp_path / "file")


def test_an_earlier_conversion_is_replaced(saved: Path):
    converted(captured.resnet, "mlp").save(saved)
    assert thesean.load(saved).plan == converted(captured.resnet, "mlp").plan
    assert {p.name for p in saved.parent.iterdir()} == {"saved"}


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="not empty and holds no conversion"):
        converted().save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.tex"}


@pytest.mark.parametrize("graph", ["", "{}", "[1]", '{"nodes": [], "edges": []}', "\xff"])
def test_a_folder_of_another_program_that_has_a_graph_json_is_left_alone(graph, tmp_path: Path):
    (tmp_path / "graph.json").write_text(graph, encoding="latin-1")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not empty and holds no conversion"):
        converted().save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"graph.json", "notes.txt"}


def test_what_else_is_in_a_conversions_folder_stays(saved: Path):
    (saved / "notes.txt").write_text("mine")
    (saved / "onnx").mkdir()
    (saved / "onnx" / "model.onnx").write_text("mine")
    converted(captured.resnet, "mlp").save(saved)
    assert thesean.load(saved).plan == converted(captured.resnet, "mlp").plan
    assert (saved / "notes.txt").read_text() == (saved / "onnx" / "model.onnx").read_text() == "mine"
    assert {p.name for p in saved.parent.iterdir()} == {"saved"}


def test_a_reader_beside_a_saving_process_sees_one_version_or_the_other(saved: Path, monkeypatch):
    """The folder is replaced while its files are read, once after each of them."""
    other, original = converted(captured.resnet, "mlp"), converted()
    digest = load_artifact.file_sha256
    turns: list[str] = []

    def meanwhile(path: Path) -> str:
        found = digest(path)
        if len(turns) < 4 and path.parent == saved:
            turns.append(path.name)
            monkeypatch.setattr(load_artifact, "file_sha256", digest)
            (other if len(turns) % 2 else original).save(saved)
            monkeypatch.setattr(load_artifact, "file_sha256", meanwhile)
        return found

    monkeypatch.setattr(load_artifact, "file_sha256", meanwhile)
    assert thesean.load(saved).plan == original.plan
    assert len(turns) == 4


@pytest.mark.parametrize("folder", ["a\0b", 5, b"saved", None])
def test_what_is_no_path_is_told(folder):
    with pytest.raises(ArtifactError, match="can't write"):
        converted().save(folder)
    with pytest.raises(ArtifactError, match="can't read"):
        thesean.load(folder)


def test_an_empty_folder_is_taken(tmp_path: Path):
    folder = tmp_path / "empty"
    folder.mkdir()
    thesean.load(converted().save(folder))


def test_a_file_in_the_way_is_left_alone(tmp_path: Path):
    path = tmp_path / "taken"
    path.write_text("mine")
    with pytest.raises(ArtifactError, match="is a file"):
        converted().save(path)
    assert path.read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"can't write .*Choose a writable folder"):
        converted().save(tmp_path / "file" / "below")


@pytest.mark.parametrize("at", ["save_file", "to_yaml", "exchange", "rename"])
def test_a_failure_in_the_middle_leaves_the_earlier_conversion(at, saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    if at == "save_file":
        monkeypatch.setattr(artifact, "save_file", full)
    elif at == "to_yaml":
        monkeypatch.setattr(thesean.Plan, "to_yaml", full)
    elif at == "exchange":
        monkeypatch.setattr(replace_folder, "exchange", full)
    else:
        monkeypatch.setattr(replace_folder, "exchange", lambda a, b: False)
        rename, calls = Path.rename, []

        def second(self, target):
            calls.append(self)
            return rename(self, target) if len(calls) != 2 else full()

        monkeypatch.setattr(Path, "rename", second)
    with pytest.raises(ArtifactError, match="No space left on device"):
        converted(captured.resnet, "mlp").save(saved)
    monkeypatch.undo()
    assert saved.is_dir()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert {p.name for p in saved.parent.iterdir()} == {"saved"}


def test_a_conversion_loads_that_a_killed_save_had_moved_away_and_the_next_save_cleans_up(saved: Path):
    left = saved.with_name(".saved.thesean-abcdefgh")
    left.mkdir()
    saved.rename(left / "earlier0")
    (left / "made").mkdir()
    (left / "lock").touch()
    assert thesean.load(saved).plan == converted().plan
    converted(captured.resnet, "mlp").save(saved)
    assert thesean.load(saved).plan == converted(captured.resnet, "mlp").plan
    assert {p.name for p in saved.parent.iterdir()} == {"saved"}


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_all_files_may_be_read_by_the_same_people(saved: Path):
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1


def test_a_module_that_could_not_be_found_again_is_not_saved(tmp_path: Path):
    bound_plan = make_plan(captured.mlp(), Target("mine", build=lambda part: nn.Linear(8, 8)))
    graph_module = build_hybrid(bound_plan).graph_module
    body = Artifact(
        graph_module=graph_module, signature=captured.mlp().signature, plan=bound_plan.plan, report=converted().report
    )
    with pytest.raises(ArtifactError, match=r"part_0: a Linear can't be saved.*Subclass TargetModule"):
        artifact.save(body, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


class Views(nn.Module):
    """Buffers that share one storage, a scalar, and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.arange(16.0).view(2, 8)
        self.register_buffer("low", whole[0])
        self.register_buffer("high", whole[1])
        self.register_buffer("same", whole[1])
        self.register_buffer("across", whole.T[:, 0])
        self.scale = torch.tensor(2.0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.low * self.scale
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x + self.high + self.same * self.across


def test_buffers_that_share_storage_and_lifted_constants_are_saved(tmp_path: Path):
    from thesean.passes.capture.capture import capture

    guide = capture(models.seeded(Views), vectors(3, 8))
    bound_plan = make_plan(guide, "mlp")
    module = build_hybrid(bound_plan).graph_module.eval()
    original = thesean.Converted(module, guide.signature, bound_plan.plan, converted().report)
    loaded = thesean.load(original.save(tmp_path / "saved"))
    assert torch.equal(loaded(vectors(2, 8)), original(vectors(2, 8)))


def test_a_constant_that_no_state_dict_has_is_saved_where_the_graph_reads_it(tmp_path: Path):
    original = copy.deepcopy(converted(captured.functional, "mlp"))
    inputs = original.signature.random_inputs({"batch": 2})
    before = original(**inputs)
    original.module.held = nn.Module()
    original.module.held.register_buffer("offset", torch.tensor(3.0), persistent=False)
    graph = original.module.graph
    with graph.inserting_before(graph.output_node()):
        offset = graph.get_attr("held.offset")
        moved = graph.call_function(torch.ops.aten.add.Tensor, (graph.output_node().args[0], offset))
    graph.output_node().args = (moved,)
    original.module.recompile()
    loaded = thesean.load(original.save(tmp_path / "saved"))
    assert torch.equal(loaded(**inputs), before + 3)


def test_bounds_and_masks_of_a_signature_come_back(tmp_path: Path):
    ids, *others = converted().signature.inputs
    mask = InputSpec(name="mask", dtype=torch.float32, shape=("batch", "time"), mask=True)
    bounds = (Bound(name="time", least=2), Bound(name="batch", least=1, most=8))
    signature = replace(converted().signature, inputs=(replace(ids, low=1), *others, mask), bounds=bounds)
    original = thesean.Converted(copy.deepcopy(converted().module), signature, converted().plan, converted().report)
    graph = original.module.graph
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        graph.placeholder("mask")
    assert thesean.load(original.save(tmp_path / "saved")).signature == signature


def beside(folder: Path, text: str) -> dict[Path, str]:
    return {folder / name: f"{name} {text}" for name in ("plan.yaml", "recipe.yaml", "notes.txt")}


def files_in(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_files_that_belong_to_a_conversion_are_back_where_it_can_not_be_replaced(at, tmp_path: Path, monkeypatch):
    """The earlier ones are taken away right before: the second of them can't be, or the replacement fails."""
    made = converted()
    found = Artifact(graph_module=made.module, signature=made.signature, plan=made.plan, report=made.report)
    first = dict(list(beside(tmp_path, "1").items())[:2])
    artifact.save(found, tmp_path / "converted", first)
    before = files_in(tmp_path)
    unlink, taken = Path.unlink, []

    def second(self: Path, missing_ok: bool = False) -> None:
        if self.parent == tmp_path and self.name in before:
            taken.append(self)
        if len(taken) > at:
            raise OSError(28, "No space left on device")
        unlink(self, missing_ok)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if at < 2:
        monkeypatch.setattr(Path, "unlink", second)
    else:
        monkeypatch.setattr(replace_folder, "exchange", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        artifact.save(found, tmp_path / "converted", beside(tmp_path, "2"))
    monkeypatch.undo()
    assert files_in(tmp_path) == before
    artifact.save(found, tmp_path / "converted", beside(tmp_path, "3"))
    assert files_in(tmp_path) == {n: f"{n} 3" for n in ("plan.yaml", "recipe.yaml", "notes.txt")}


def test_saving_twice_gives_the_same_bytes(tmp_path: Path):
    first, second = (converted().save(tmp_path / name) for name in ("a", "b"))
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


def test_a_copy_of_the_folder_loads(saved: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "elsewhere" / "copy")
    thesean.load(tmp_path / "elsewhere" / "copy")


def test_paths_may_be_text_and_below_folders_that_are_not_there_yet(tmp_path: Path):
    folder = converted().save(f"{tmp_path}/a/b/c")
    assert folder == tmp_path / "a" / "b" / "c"
    thesean.load(str(folder))


@pytest.mark.parametrize(
    "names",
    [
        ("transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.weight"),
        ("part_0.last.weight", "part_1.last.weight"),
        ("transformer.h.0.ln_1.bias", "part_1.last.bias"),
        ("part_0.last.bias", "transformer.h.1.ln_1.bias"),
        ("part_0.core.weight_ih_l0", "part_0.core.weight_hh_l0"),
    ],
)
def test_weights_that_the_caller_ties_are_saved_once_and_stay_tied(names: tuple[str, str], tmp_path: Path):
    original = copy.deepcopy(converted())
    holders = [original.module.get_submodule(n.rpartition(".")[0]) for n in names]
    leaves = [n.rpartition(".")[2] for n in names]
    setattr(holders[1], leaves[1], getattr(holders[0], leaves[0]))
    loaded = thesean.load(original.save(tmp_path / "saved"))
    first, second = (attribute(loaded.module, name) for name in names)
    assert first is second
    assert len(list(loaded.module.parameters())) == len(list(original.module.parameters()))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens(2, 5)).logits, original(tokens(2, 5)).logits, rtol=0, atol=0)


def test_a_buffer_that_the_caller_ties_is_saved_once_and_stays_tied(tmp_path: Path):
    torch.manual_seed(0)
    original = thesean.compile(models.gpt2(), "reservoir", data=models.token_batches(), recipe="fast", progress=False)
    first, second = (original.module.get_submodule(f"part_{number}") for number in range(2))
    second.bias_U = first.bias_U
    loaded = thesean.load(original.save(tmp_path / "saved"))
    assert attribute(loaded.module, "part_0.bias_U") is attribute(loaded.module, "part_1.bias_U")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens(2, 5)).logits, original(tokens(2, 5)).logits, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize(
    "name", ["graph.json", "weights.safetensors", "plan.yaml", "report.json", "example.safetensors"]
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(ArtifactError, match=rf"{name} (is no file|is missing)"):
        thesean.load(saved)
