"""A saved folder is data, whoever wrote it: what a hostile one says is refused at load, by ArtifactError alone."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import thesean
from benchmarks.fuzzing.altered import FOLDERS
from benchmarks.fuzzing.campaign import FAULTS, FOUND, Corpus, outcomes, warm_up
from tests import models
from tests.models import tokens, vectors
from tests.test_artifact import converted
from thesean import load_artifact
from thesean.artifact import Artifact, write_files
from thesean.errors import ArtifactError, PlanError
from thesean.passes.graph import unchecked
from thesean.passes.graph.record import record
from thesean.write_file import full_is_an_oserror

aten = torch.ops.aten

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
    assert isinstance(output, dict)


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
    with pytest.raises(ArtifactError, match="output_class"):
        thesean.load(folder)  # it has no logits


def first(document: dict[str, Any], op: str, target: str = "") -> dict[str, Any]:
    return next(r for r in document["nodes"] if r["op"] == op and r["target"].startswith(target))


def swapped_shape(document):
    document["signature"]["inputs"][0]["shape"] = ["time", "batch", 3]


def other_rank(document):
    document["signature"]["inputs"][0]["shape"] = ["batch"]


def wrong_dtype(document):
    document["signature"]["inputs"][0]["dtype"] = "float32"


def unknown_dtype(document):
    document["signature"]["inputs"][0]["dtype"] = "load"


def bound_of(*rows: Any) -> Change:
    def change(document: dict[str, Any]) -> None:
        document["signature"]["bounds"] = [dict(zip(("name", "least", "most"), row, strict=True)) for row in rows]

    change.__name__ = f"bounds {rows}"
    return change


def extra_input(document):
    document["signature"]["inputs"].append({"name": "more", "dtype": "int64", "shape": ["batch"]})


def extra_placeholder(document):
    document["nodes"].insert(0, {"name": "more", "op": "placeholder", "target": "more"})


def renamed_input(document):
    first(document, "placeholder")["target"] = "others"


def added(target: str, *args: Any, **kwargs: Any) -> Callable[[dict[str, Any]], None]:
    """A node more, which the output holds."""

    def change(document: dict[str, Any]) -> None:
        row = {"name": "more", "op": "call_function", "target": target, "args": list(args), "kwargs": kwargs}
        document["nodes"].insert(-1, row)
        document["nodes"][-1]["value"] = {"tuple": [document["nodes"][-1]["value"], {"node": "more"}]}

    change.__name__ = f"{target} {args}"[:60]
    return change


IDS = {"node": "input_ids"}


@pytest.mark.parametrize(
    "change",
    [
        swapped_shape, other_rank, wrong_dtype, unknown_dtype, extra_input, extra_placeholder, renamed_input,
        added("aten.ones.default", [10**12]), added("aten.ones.default", [2**40, 2**40]),
        added("aten.full.default", [10**10], 1.0), added("aten.arange.default", 10**11),
        added("aten.ones.default", [4], device={"device": "cuda"}),
        added("aten.repeat.default", IDS, [10**8, 1, 1]), added("aten.matmul.default", IDS, IDS),
        added("operator.mul", [1], 10**10), added("operator.mul", "a", 10**10), added("operator.add", IDS, 1),
        added("operator.getitem", IDS, 0), added("operator.mul", 2**62, 4), added("operator.floordiv", 1, 0),
        added("aten.item.default", IDS), added("aten.sym_size.int", IDS, 9),
        added("aten.scaled_dot_product_attention.default", IDS, IDS, IDS),
        added("aten._reshape_alias.default", IDS, [10**6], [1]), added("aten._ctc_loss.default", IDS, IDS, [1], [1]),
        added("aten._sparse_coo_tensor_unsafe.default", IDS, IDS, [1]),
        bound_of(("times", 1, 16)), bound_of(("time", 0, 16)), bound_of(("time", 9, 8)), bound_of(("time", 1, "many")),
        bound_of(("time", 1, 1.5)), bound_of(("time", 1, 2**70)), bound_of((["time"], 1, None)),
        added("aten.segment_reduce.default", IDS, "max"), added("aten.set_grad_enabled.default", False),
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_runs(change, folder: Path):
    rewrite(folder, change)
    with pytest.raises(ArtifactError):
        thesean.load(folder)
    assert torch.is_grad_enabled()


def test_a_size_is_a_product_of_a_few_sizes_and_no_tower_of_them(folder: Path):
    def tower(document):
        rows = document["nodes"]
        rows.insert(-1, {"name": "s0", "op": "call_function", "target": "aten.sym_size.int", "args": [IDS, 1]})
        for k in range(40):  # 2 to the 2 to the 40: not a number that memory holds
            args: list[Any] = [{"node": f"s{k}"}, {"node": f"s{k}"}]
            rows.insert(-1, {"name": f"s{k + 1}", "op": "call_function", "target": "operator.mul", "args": args})
        document["signature"]["inputs"][0]["shape"] = ["batch", "time"]

    (folder / "example.safetensors").unlink()
    rewrite(folder, tower)
    with pytest.raises(ArtifactError, match="a product of more than 8 sizes"):
        thesean.load(folder)


def test_memory_is_bounded_by_what_the_caller_says(folder: Path):
    size = sum(p.stat().st_size for p in folder.iterdir())
    assert thesean.load(folder, max_bytes=2**30)
    for bound in (0, size):
        with pytest.raises(ArtifactError, match="allowed"):
            thesean.load(folder, max_bytes=bound)
    read = size + 16 * (folder / "graph.json").stat().st_size
    with pytest.raises(ArtifactError, match="and more once read"):
        thesean.load(folder, max_bytes=read - 1)
    rewrite(folder, added("aten.ones.default", [2**20]))  # 4 MiB
    assert thesean.load(folder)
    with pytest.raises(ArtifactError, match=r"node more \(aten\.ones\.default\) takes 4,194,304 bytes"):
        thesean.load(folder, max_bytes=3 * 2**20)


def lstm() -> list[torch.Tensor]:
    return [torch.ones(64, 8), torch.ones(64, 16), torch.ones(64), torch.ones(64)]


def one_attention(tmp_path: Path, keys: int, values: int) -> Path:
    """A folder of one fused attention over constants of these many steps."""
    folder = converted().save(tmp_path / "attention")

    def change(document):
        rows = [first(document, "placeholder")]
        for name, length in (("q", 3), ("k", keys), ("v", values)):
            args: list[Any] = [[1, 2, {"node": "time"} if length < 0 else length, 8]]
            rows.append({"name": name, "op": "call_function", "target": "aten.ones.default", "args": args})
        rows.insert(1, {"name": "time", "op": "call_function", "target": "aten.sym_size.int", "args": [IDS, 1]})
        args = [{"node": n} for n in "qkv"]
        target = "aten.scaled_dot_product_attention.default"
        rows.append({"name": "a", "op": "call_function", "target": target, "args": args})
        document["nodes"] = [*rows, {"name": "output", "op": "output", "target": "output", "value": {"node": "a"}}]
        document["modules"], document["signature"]["output_class"] = {}, None

    rewrite(folder, change)
    return folder


def test_attention_looks_at_its_keys_and_values_at_load_and_at_every_call(tmp_path: Path):
    with pytest.raises(ArtifactError, match="don't fit each other"):
        thesean.load(one_attention(tmp_path / "a", 5, 5_000_000))  # which kills the process where torch runs it
    loaded = thesean.load(one_attention(tmp_path / "b", models.LENGTH, -1))  # they agree at the example's length
    assert loaded(tokens(2, models.LENGTH)).shape == (1, 2, 3, 8)
    for run in (loaded, copy.deepcopy(loaded.module), lambda ids: record(loaded.module, {"input_ids": ids})):
        with pytest.raises(ArtifactError, match="don't fit each other"):
            run(tokens(2, models.LENGTH + 1))


def said(key: str, value: Any) -> Change:
    return lambda document: document.update({key: value})


def checked(name: str, digest: str) -> Change:
    return lambda document: document["files_sha256"].update({name: digest})


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (aten.div.Tensor_mode, (whole := torch.ones(2, dtype=torch.int64), whole), {"rounding_mode": "trunc"}),
        (aten.div.Scalar_mode, (whole, -1), {"rounding_mode": "trunc"}),
        (aten._weight_norm.default, (torch.ones(0, 4), torch.ones(0, 1)), {}),
        (aten._weight_norm.default, (torch.ones(2, 4), torch.ones(3, 1)), {}),
        (aten.lstm.input, (torch.ones(4, 5, 8), [torch.ones(1, 3, 16)] * 2, lstm(), True, 1, 0.0, *[False] * 3), {}),
        (
            aten.lstm.input,
            (torch.ones(5, 4, 8), [torch.ones(1, 4, 16)] * 2, lstm()[:3], True, 1, 0.0, *[False] * 3),
            {},
        ),
        (aten.gru.input, (torch.ones(5, 4, 8), torch.ones(1, 4, 16), lstm(), True, 1, 0.0, *[False] * 3), {}),
        (aten.gru.input, (torch.ones(5, 4, 8), torch.ones(4, 16), lstm(), True, 1, 0.0, *[False] * 3), {}),
    ],
)
def test_what_torch_does_not_look_at_is_looked_at(target, args, kwargs):
    with pytest.raises(ArtifactError, match="don't fit each other"):
        unchecked.check(target, args, kwargs)


def test_what_fits_passes():
    state = [torch.ones(1, 4, 16)] * 2
    unchecked.check(aten.lstm.input, (torch.ones(5, 4, 8), state, lstm(), True, 1, 0.0, *[False] * 3), {})
    unchecked.check(aten._weight_norm.default, (torch.ones(2, 4), torch.ones(1, 4), 1), {})
    unchecked.check(aten.div.Tensor_mode, (torch.ones(2), torch.ones(2)), {"rounding_mode": "trunc"})
    unchecked.check(aten.div.Scalar_mode, (torch.ones(2, dtype=torch.int64), 3), {"rounding_mode": "trunc"})


def test_only_artifact_errors_come_out(folder: Path):
    for name, text in (
        ("plan.yaml", "a: &a 1\nb: *a\n"), ("report.json", "[" * 100_000), ("graph.json", "[" * 100_000),
        ("report.json", '{"guide": []}'), ("plan.yaml", "parts: [{path: 1}]\n"),
    ):  # fmt: skip
        before = (folder / name).read_bytes()
        (folder / name).write_text(text)
        if name != "graph.json":
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            rewrite(folder, checked(name, digest))
        with pytest.raises(ArtifactError):
            thesean.load(folder)
        (folder / name).write_bytes(before)
    for path in (folder / "none", "nul\0", "x" * 5000):
        with pytest.raises(ArtifactError):
            thesean.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["modules"]["part_0"].update(target="nothing"),
        lambda d: d["modules"]["part_0"]["config"].update(heads=2**40),
        lambda d: d["modules"]["part_0"]["config"].update(width_in=2**19),
        lambda d: d["modules"]["part_0"]["config"].update(surprise=[]),
        lambda d: d["modules"].update(part_0=[]),
        lambda d: d.update(symbols=[]),
        lambda d: d.update(aliases={"a.__dict__": "lm_head.weight"}),
        lambda d: d.update(aliases={"part_0.last.bias": "nothing"}),
        lambda d: d.update(nodes=None),
    ],
)
def test_modules_and_names_that_do_not_fit_are_refused(change, folder: Path):
    rewrite(folder, change)
    with pytest.raises(ArtifactError):
        thesean.load(folder)


@pytest.mark.parametrize(
    "key", ["parameter:__class__.x", "parameter:forward", "other:x", "x", "parameter:a.__dict__.b", "buffer:"]
)
def test_weights_are_named_as_attributes_are(key, folder: Path):
    tensors = load_file(folder / "weights.safetensors")
    save_file({**tensors, key: torch.ones(2)}, folder / "weights.safetensors")
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    rewrite(folder, checked("weights.safetensors", digest))
    with pytest.raises(ArtifactError):
        thesean.load(folder)


def test_loading_draws_no_random_numbers_and_imports_no_compiler(folder: Path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    thesean.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    script = (
        "import sys, thesean; thesean.load(sys.argv[1]); print('torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    )
    root = Path(thesean.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(FOLDERS / "gru")],
        capture_output=True,
        text=True,
        cwd=root,
        check=True,
    )  # fmt: skip
    assert run.stdout.strip() == "False False"  # two seconds


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_altered_folders_are_refused_or_harmless(seed: int):
    """10 s of `python -m benchmarks fuzz` each, some runs at the least, and those that were found to be neither."""
    warm_up()
    until, first, corpus = time.monotonic() + 10, seed * 10**9, Corpus()
    found = outcomes(FOUND) | outcomes(range(first, first + 60), corpus=corpus)
    found |= outcomes(range(first + 60, first + 10**6), until, corpus)
    assert len(found) >= 60
    assert {chain: text for chain, text in found.items() if text.startswith(FAULTS)} == {}


def test_an_example_that_the_document_knows_nothing_of_is_not_read(folder: Path):
    (folder / "example.safetensors").write_bytes(b"of somebody else")
    rewrite(folder, lambda document: document["files_sha256"].pop("example.safetensors"))
    assert all(spec.example is None for spec in thesean.load(folder).signature.inputs)


def test_files_and_what_a_call_holds_are_bounded_together(folder: Path):
    rewrite(folder, added("aten.ones.default", [2**22]))  # 16 MiB
    size = sum(p.stat().st_size for p in folder.iterdir())
    with pytest.raises(ArtifactError, match=rf"a call holds 16,\d+,\d+ bytes beside {size:,} of files"):
        thesean.load(folder, max_bytes=2**24 + size // 2)


def test_a_network_is_probed_at_a_size_that_it_is_known_to_run_at():
    signature, plan, report = converted().signature, converted().plan, converted().report
    bare = replace(signature, inputs=tuple(replace(s, example=None) for s in signature.inputs))
    unknown = replace(plan, sizes={})
    probed = [load_artifact._probed(s, signature, plan, report) for s in ("batch", "time")]
    assert probed == [signature.example_sizes[s] for s in ("batch", "time")]
    for length, expected in ((10, 10), (None, 8)):
        told = replace(report, train_length=length)
        assert load_artifact._probed("time", bare, unknown, told) == expected
        assert load_artifact._probed("batch", bare, unknown, told) == 2


def test_a_plan_that_is_none_is_told_where_no_weights_are_read(folder: Path):
    (folder / "plan.yaml").write_text("[]")
    with pytest.raises(PlanError, match="not a mapping with parts"):
        load_artifact.read_plan_and_report(folder)
    (folder / "report.json").write_text("[")
    with pytest.raises(ArtifactError, match=r"report\.json can't be read: JSONDecodeError"):
        load_artifact.read_plan_and_report(folder)


@pytest.mark.parametrize("path", [5, [], {"transformers.modeling_outputs": "BaseModelOutput"}, True])
def test_an_output_class_is_text_or_null(path, folder: Path):
    rewrite(folder, named(path))
    with pytest.raises(ArtifactError, match="output_class is neither text nor null"):
        thesean.load(folder)


def test_bounds_of_sizes_that_are_ones_pass(folder: Path):
    rewrite(folder, bound_of(("time", 2, None), ("batch", 2, 2)))
    assert [b.describe() for b in thesean.load(folder).signature.bounds] == ["2 or more", "2 alone"]


def test_parameters_that_are_not_trained_are_not_trained_once_loaded(tmp_path: Path):
    original = copy.deepcopy(converted())
    frozen = {name for name, _ in original.module.named_parameters() if name.startswith("part_0.")}
    assert frozen
    for name, parameter in original.module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    loaded = thesean.load(original.save(tmp_path / "saved"))
    assert {name for name, p in loaded.module.named_parameters() if not p.requires_grad} == frozen
    others: list[Any] = [5, {"part_0.last.weight": True}, [[]]]
    for names in others:
        rewrite(tmp_path / "saved", said("frozen", names))
        with pytest.raises(ArtifactError):
            thesean.load(tmp_path / "saved")


def test_a_hubs_weights_are_told_apart_by_the_names_of_the_buffers(tmp_path: Path):
    made = converted()
    found = Artifact(graph_module=made.module, signature=made.signature, plan=made.plan, report=made.report)
    write_files(tmp_path, found, hub=True)
    assert not (tmp_path / "weights.safetensors").exists()
    loaded = load_artifact.load(tmp_path)
    assert models.same_state(loaded.graph_module, made.module.state_dict())
    kinds = [{name for name, _ in m.named_parameters()} for m in (loaded.graph_module, made.module)]
    assert kinds[0] == kinds[1]
    for names in (None, "part_0", {"part_0": 1}, [1]):
        rewrite(tmp_path, said("buffers", names))
        with pytest.raises(ArtifactError, match="expected the names of the buffers"):
            load_artifact.load(tmp_path)


def test_a_graph_that_an_operator_runs_is_told_by_the_operator(tmp_path: Path):
    original = copy.deepcopy(converted())
    original.module.branch = copy.deepcopy(original.module)
    graph = original.module.graph
    with graph.inserting_before(graph.output_node()):
        branch = graph.get_attr("branch")
        graph.call_function(torch.ops.higher_order.cond, (True, branch, branch, ()))
    with pytest.raises(ArtifactError, match=r"^cond runs a graph of its own, which can't be saved"):
        original.save(tmp_path / "saved")


def test_what_a_disk_says_is_an_error_of_the_disk(tmp_path: Path):
    with pytest.raises(OSError, match=r"^I/O error: No such file or directory"), full_is_an_oserror():
        save_file({"x": torch.ones(2)}, tmp_path / "none" / "x.safetensors")
