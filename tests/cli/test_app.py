from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import thesean
from thesean.choose.quality import Effort, Prober
from thesean.cli.app import app
from thesean.deploy.timing import parts as part_timing
from thesean.deploy.timing import plan as payoff
from thesean.errors import PlanError

GUIDES = """
import torch
from torch import nn
from torch.nn import functional as F

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, x):
        return self.layer(x)

def gpt():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, n_positions=128, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

def mixer():
    from tests.models import token_mixer
    return token_mixer()

def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 12, 8, generator=generator) for _ in range(4)]

def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 32, (4, 12), generator=generator)} for _ in range(4)]

def loss(output, batch):
    logits = output["logits"] if isinstance(output, dict) else output.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

def vectors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 4, generator=generator) for _ in range(3)]

def generator():
    yield from batches()

def broken():
    raise RuntimeError("no weights here")

toy = Toy()
number = 3
"""


@pytest.fixture
def guides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with guides_for_cli.py in it."""
    (tmp_path / "guides_for_cli.py").write_text(GUIDES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("guides_for_cli", None)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100", "NO_COLOR": "1"})


def error_of(result: Result) -> str:
    """The one line on stderr of a failed command."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_help_names_the_commands_and_shows_a_whole_voyage() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("convert", "plan", "export", "compare", "targets"):
        assert f"  thesean {command} " in result.output or f"\n  {command} " in result.output
    assert "    thesean plan models.gpt:make --target rnn\n" in result.output


@pytest.mark.parametrize("command", ["activations", "convert", "plan", "export", "compare", "targets"])
def test_every_command_teaches_by_an_example_that_keeps_its_line(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert any(line.startswith("    thesean ") for line in result.output.splitlines())


def test_the_version_is_told_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source tree on PYTHONPATH has no metadata, and that of an older name says nothing."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert run("--version").output == f"thesean {thesean.__version__}\n"


def test_a_guide_that_is_no_module_and_no_folder_says_what_is_expected(guides: Path) -> None:
    assert "expected package.module:factory or a local Hugging Face folder" in error_of(run("plan", "gpt2"))


def test_an_unknown_module_and_an_unknown_name_are_told_apart(guides: Path) -> None:
    assert "no module 'nowhere'" in error_of(run("plan", "nowhere:make"))
    assert "did you mean 'gpt'?" in error_of(run("plan", "guides_for_cli:gp"))


def test_a_factory_that_raises_is_quoted(guides: Path) -> None:
    assert "raised RuntimeError: no weights here" in error_of(run("plan", "guides_for_cli:broken"))


def test_debug_shows_the_exception_itself(guides: Path) -> None:
    result = run("plan", "guides_for_cli:broken", "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, thesean.errors.TheseanError)


def test_a_guide_that_is_not_a_module_is_refused(guides: Path) -> None:
    assert "expected an nn.Module, found int" in error_of(run("plan", "guides_for_cli:number"))


def test_a_folder_without_config_is_refused(guides: Path) -> None:
    (guides / "empty").mkdir()
    assert "config.json" in error_of(run("plan", "empty"))


def test_a_folder_whose_architecture_is_unknown_runs_none_of_its_code(guides: Path) -> None:
    (guides / "mine").mkdir()
    (guides / "mine" / "config.json").write_text(json.dumps({"architectures": ["MyModel"], "auto_map": {"A": "a.B"}}))
    assert "has no model 'MyModel'" in error_of(run("plan", "mine"))


def test_transformers_missing_names_the_extra(guides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (guides / "mine").mkdir()
    (guides / "mine" / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "thesean-compiler[hf]" in error_of(run("plan", "mine"))


def test_convert_without_anything_to_write_stops_before_loading_the_guide(guides: Path) -> None:
    assert "give --out DIR, --onnx FILE, --workdir DIR or several" in error_of(run("convert", "guides_for_cli:broken"))


def test_an_unwritable_place_stops_before_loading_the_guide(guides: Path) -> None:
    (guides / "file").write_text("earlier result")
    message = error_of(run("convert", "guides_for_cli:broken", "--out", "file/below"))
    assert "not a folder that you may write" in message
    assert "found a file" in error_of(run("convert", "guides_for_cli:broken", "--out", "file"))
    assert (guides / "file").read_text() == "earlier result"


def test_plan_and_target_together_are_refused(guides: Path) -> None:
    result = run("convert", "guides_for_cli:toy", "--plan", "p.yaml", "--target", "gru", "--out", "o")
    assert "--plan already says" in error_of(result)


def test_data_that_can_be_read_only_once_is_refused(guides: Path) -> None:
    result = run("convert", "guides_for_cli:toy", "--data", "guides_for_cli:generator", "--out", "o")
    assert "Return a list or a DataLoader" in error_of(result)


def test_a_typed_error_of_the_compiler_is_one_line_and_exit_code_2(
    guides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PlanError("parts 'h.[9]' match nothing.\nknown: layer")

    monkeypatch.setattr(thesean, "plan", refuse, raising=False)
    message = error_of(run("plan", "guides_for_cli:toy", "--parts", "h.[9]"))
    assert message == "error: parts 'h.[9]' match nothing. known: layer"


def test_ctrl_c_exits_130_with_one_line(guides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(thesean, "compile", interrupt, raising=False)
    result = run("convert", "guides_for_cli:toy", "--out", "o")
    assert result.exit_code == 130
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (guides / "o").exists()


def test_a_folder_that_holds_something_else_is_refused_before_anything_trains(
    guides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (guides / "o").mkdir()
    (guides / "o" / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(thesean, "compile", lambda *_, **__: pytest.fail("reached"), raising=False)
    assert "not empty and holds no conversion" in error_of(run("convert", "guides_for_cli:toy", "--out", "o"))


def test_what_can_not_be_saved_is_kept_elsewhere(guides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thesean, "compile", lambda *_, **__: object(), raising=False)
    module = sys.modules["thesean.cli.app"]
    monkeypatch.setattr(module, "kept_or_told", lambda *_: "not saved: full. Its weights are in x.")
    found = error_of(run("convert", "guides_for_cli:toy", "--out", "o"))
    assert "not saved: full. Its weights are in x." in found


def test_convert_hands_every_choice_to_compile(guides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    class Stopped(PlanError):
        pass

    def record(model: object, **chosen: object) -> None:
        seen.update(chosen, model=model)
        raise Stopped("seen")

    monkeypatch.setattr(thesean, "compile", record, raising=False)
    words = "convert guides_for_cli:toy -t a=keep -t b.*=gru:width=2 --data guides_for_cli:batches --out o --quiet"
    words += " --loss guides_for_cli:loss --eval-data guides_for_cli:batches --keep c --keep d --parts x.* --seed 7"
    error_of(run(*words.split(), "--recipe", "fast", "--granularity", "sublayer"))
    module = sys.modules["guides_for_cli"]
    assert seen["model"] is module.toy
    assert seen["target"] == {"a": "keep", "b.*": thesean.Target("gru", width=2)}
    assert seen["loss"] is module.loss
    assert len(seen["data"]) == len(seen["eval_data"]) == 4  # type: ignore[arg-type]
    rest = {key: seen[key] for key in ("keep", "parts", "seed", "recipe", "granularity", "progress")}
    assert rest == dict(keep=("c", "d"), parts=["x.*"], seed=7, recipe="fast", granularity="sublayer", progress=False)


def test_what_a_part_may_cost_and_what_is_spent_are_handed_on(guides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(model: object, **chosen: object) -> None:
        seen.update(chosen)
        raise PlanError("seen")

    monkeypatch.setattr(thesean, "compile", record, raising=False)
    words = "convert guides_for_cli:toy --out o --quiet --recipe paper --max-drop 0.02 --retry fast"
    words += " --activation-checkpointing --gradient-accumulation 4 --sharded"
    words += " --observe tensorboard --observe trackio --budget"
    for given, wanted in (("90", 90), ("10min", "10min")):
        error_of(run(*words.split(), given))
        assert seen["budget"] == wanted
    assert seen["progress"] == [False, "tensorboard", "trackio"]
    assert seen["recipe"].max_drop == 0.02
    assert seen["recipe"].activation_checkpointing
    assert seen["recipe"].sharded
    assert seen["recipe"].gradient_accumulation == 4
    assert seen["recipe"].retry == thesean.Recipe.named("fast")
    assert seen["recipe"].alignment.measure == "cka"


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_how_inputs_and_outputs_are_read_is_handed_on(
    guides: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    seen: dict[str, object] = {}

    def record(model: object, **chosen: object) -> None:
        seen.update(chosen)
        raise PlanError("seen")

    monkeypatch.setattr(thesean, {"convert": "compile"}.get(command, command), record, raising=False)
    words = [command, "guides_for_cli:toy", "--inputs", "guides_for_cli:loss", "--dynamic", "x=1:time"]
    words += ["--labels", "guides_for_cli:batches"]
    words += [
        "--outputs",
        "logits=softmax",
        "--outputs",
        "value=mse",
        *(["--out", "o"] if command == "convert" else []),
    ]
    error_of(run(*words))
    assert seen["inputs"] is sys.modules["guides_for_cli"].loss
    assert seen["labels"] is sys.modules["guides_for_cli"].batches
    assert seen["outputs"] == {"logits": "softmax", "value": "mse"}
    assert seen["dynamic"] == {"x": {1: "time"}}


def test_a_reader_that_is_no_function_and_a_kind_that_is_none_are_refused(guides: Path) -> None:
    refused = run("plan", "guides_for_cli:toy", "--inputs", "guides_for_cli:number")
    assert "expected a function inputs(batch)" in error_of(refused)
    assert "expected NAME=KIND" in error_of(run("plan", "guides_for_cli:broken", "--outputs", "x=kl"))


def test_fixed_dimensions_are_fixed_in_what_is_converted(guides: Path) -> None:
    words = ["convert", "guides_for_cli:mixer", "--data", "guides_for_cli:sequences", "--recipe", "fast", "--quiet"]
    result = run(*words, "--dynamic", "none", "--out", "fixed")
    assert result.exit_code == 0, result.output
    assert thesean.load(guides / "fixed").signature.symbols == ()


# The whole way, against the compiler itself.


def test_targets_lists_every_family_with_its_summary() -> None:
    result = run("targets")
    assert result.exit_code == 0, result.output
    for name in thesean.targets():
        assert f"\n{name} " in result.output


def test_an_unknown_target_is_one_line_with_a_suggestion(guides: Path) -> None:
    message = error_of(run("plan", "guides_for_cli:gpt", "--target", "rn", "--data", "guides_for_cli:batches"))
    assert "unknown target 'rn'; did you mean 'rnn'?" in message


def test_compare_prints_the_table_and_writes_json_and_a_heatmap(guides: Path) -> None:
    pytest.importorskip("matplotlib")
    words = "compare guides_for_cli:toy guides_for_cli:Toy --data guides_for_cli:vectors --json c.json --plot c.png"
    result = run(*words.split(), "--layers-a", "lay*")
    assert result.exit_code == 0, result.output
    values = json.loads((guides / "c.json").read_text())
    assert (values["layers_a"], values["layers_b"], values["examples"]) == (["layer"], ["layer"], 48)
    assert f"{values['matrix'][0][0]:.3f}" in result.stdout
    assert (guides / "c.png").stat().st_size > 1000


def test_compare_takes_the_folder_of_a_saved_conversion(guides: Path) -> None:
    words = "convert guides_for_cli:toy --data guides_for_cli:vectors -t mlp --granularity finest --parts layer"
    assert run(*words.split(), "--recipe", "fast", "--out", "saved", "--quiet").exit_code == 0
    result = run("compare", "guides_for_cli:toy", "saved", "--data", "guides_for_cli:vectors")
    assert result.exit_code == 0, result.output
    assert "Toy (rows) and converted (columns)" in " ".join(result.output.split())
    assert "layer (mlp)" in result.output


def test_a_heatmap_that_can_not_be_drawn_stops_before_a_model_is_loaded(
    guides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "compare guides_for_cli:broken guides_for_cli:toy --data guides_for_cli:vectors --plot"
    assert "plot c.doc: expected a name that ends in one of" in error_of(run(*words.split(), "c.doc"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in error_of(run(*words.split(), "c.png"))


def test_compare_names_a_glob_without_a_match_and_an_unknown_measure(guides: Path) -> None:
    words = "compare guides_for_cli:toy guides_for_cli:Toy --data guides_for_cli:vectors"
    message = error_of(run(*words.split(), "--layers-b", "h.*"))
    assert "layers_b: no module of Toy matches 'h.*'. It has: layer" in message
    assert "did you mean 'cka'?" in error_of(run(*words.split(), "--measure", "ckaa"))


def test_plan_prints_a_part_per_block_and_writes_yaml(guides: Path) -> None:
    result = run("plan", "guides_for_cli:gpt", "-t", "gru", "--data", "guides_for_cli:batches", "--yaml", "plan.yaml")
    assert result.exit_code == 0, result.output
    assert "transformer.h.0" in result.output
    assert "transformer.h.1" in result.output
    assert str(thesean.Plan.from_yaml(guides / "plan.yaml")) in result.output


def test_a_run_in_a_workdir_is_called_again(guides: Path) -> None:
    words = "convert guides_for_cli:gpt --data guides_for_cli:batches --loss guides_for_cli:loss --recipe fast"
    refused = error_of(run(*words.split(), "--workdir", "run", "--resume", "must"))
    assert "no run to continue: nothing was begun there" in refused
    assert run(*words.split(), "--workdir", "run").exit_code == 0
    assert thesean.load(guides / "run" / "converted") is not None
    assert run(*words.split(), "--workdir", "run", "--resume", "must").exit_code == 0


@pytest.mark.thorough
def test_a_saved_folder_is_exported_with_whole_numbers_for_weights(guides: Path) -> None:
    made = run(
        "convert", "guides_for_cli:gpt", "--data", "guides_for_cli:batches", "--recipe", "fast", "--out", "out", "-q"
    )
    assert made.exit_code == 0, made.output
    told = run("export", "out", "q.onnx", "--quantize", "int8-static", "--data", "guides_for_cli:batches")
    assert told.exit_code == 0, told.output
    assert "calibrated on 3 batches" in told.stdout
    assert "from the exact file on the last batch of data" in told.stdout
    assert "quantised" in run("inspect", "q.onnx").stdout
    assert "give --quantize too" in error_of(run("export", "out", "no.onnx", "--data", "guides_for_cli:batches"))
    assert "give both" in error_of(run("convert", "guides_for_cli:gpt", "--out", "other", "--quantize", "int8"))
    assert not Path("no.onnx").exists()


@pytest.mark.thorough
def test_convert_saves_exports_and_the_saved_folder_exports_again(guides: Path) -> None:
    words = "convert guides_for_cli:gpt --data guides_for_cli:batches --loss guides_for_cli:loss --recipe fast"
    result = run(*words.split(), "--out", "out", "--onnx", "a.onnx")
    assert result.exit_code == 0, result.output
    assert "out" in result.stdout
    assert (guides / "a.onnx").stat().st_size > 0
    assert thesean.load(guides / "out") is not None
    again = run("export", "out", "b.onnx", "--stateful", "no", "--external-data")
    assert again.exit_code == 0, again.output
    assert "the weights are in b.onnx." in again.stdout
    told = run("inspect", "b.onnx")
    assert told.exit_code == 0, told.output
    assert str(thesean.load(guides / "out").plan) in told.stdout
    assert "of 2 parts replaced" in told.stdout


def test_a_runtime_and_its_tokenizer_are_handed_on(guides: Path) -> None:
    words = "convert guides_for_cli:toy -t mlp --parts layer --data guides_for_cli:vectors --recipe fast"
    assert run(*words.split(), "--out", "out").exit_code == 0
    told = run("export", "out", "served", "--runtime", "genai")
    assert "onnxruntime-genai serves causal language models alone" in error_of(told)
    told = run("export", "out", "m.onnx", "--tokenizer", "out")
    assert "tokenizer: only a folder for runtime='genai' has one" in error_of(told)
    assert not (guides / "served").exists()
    assert not (guides / "m.onnx").exists()


def test_what_can_not_be_compared_is_written_where_check_says_so(guides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "convert guides_for_cli:toy -t mlp --parts layer --data guides_for_cli:vectors --recipe fast"
    assert run(*words.split(), "--out", "out").exit_code == 0
    broken = thesean.load(guides / "out")
    with torch.no_grad():
        for parameter in broken.module.parameters():
            parameter.fill_(float("nan"))
    broken.save(guides / "out")
    monkeypatch.setattr(thesean, "compile", lambda *_, **__: broken)
    void = "expected finite numbers to compare, found none in the torch module's own"
    told = "not checked, as check='skip' allows: onnxruntime vs torch at"
    for file, command in (("a.onnx", [*words.split(), "--onnx", "a.onnx"]), ("b.onnx", ["export", "out", "b.onnx"])):
        assert void in error_of(run(*command))
        assert not (guides / file).exists()
        result = run(*command, "--check", "skip")
        assert result.exit_code == 0, result.output
        assert told in result.stdout
        assert "not checked: onnxruntime vs torch" in run("inspect", file).stdout


def test_check_belongs_to_a_file_and_is_one_of_two_words(guides: Path) -> None:
    words = "convert guides_for_cli:gpt --data guides_for_cli:batches"
    assert "--check says how --onnx FILE is verified" in error_of(
        run(*words.split(), "--out", "out", "--check", "skip")
    )
    assert not (guides / "out").exists()
    result = run("export", "out", "b.onnx", "--check", "never")
    assert result.exit_code == 2
    assert "'never' is not one of 'all', 'skip'" in result.stderr.replace("\n", " ")


@pytest.mark.thorough
def test_an_edited_plan_of_a_hugging_face_folder_is_what_runs(guides: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(guides / "folder")
    planned = run("plan", "folder", "-t", "mingru", "--data", "guides_for_cli:batches", "--yaml", "plan.yaml")
    assert planned.exit_code == 0, planned.output
    words = "convert folder --plan plan.yaml --data guides_for_cli:batches --recipe fast --quiet --out out"
    result = run(*words.split())
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert str(thesean.load(guides / "out").plan) == str(thesean.Plan.from_yaml(guides / "plan.yaml"))


@pytest.mark.thorough
def test_auto_chooses_for_a_budget(guides: Path) -> None:
    result = run(
        "plan", "guides_for_cli:gpt", "--target", "auto", "--data", "guides_for_cli:batches",
        "--constraint", "params=8000", "--candidate", "keep", "--candidate", "identity", "--yaml", "plan.yaml",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    plan = thesean.Plan.from_yaml("plan.yaml")
    assert plan.new_params <= 8000
    assert {p.target for p in plan} == {"keep", "identity"}


@pytest.mark.thorough
def test_several_budgets_write_a_plan_each(guides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(Prober, effort=Effort(part_steps=3, whole_steps=5))  # what one budget takes is the usual effort
    monkeypatch.setattr("thesean.choose.choose_plan.Prober", few)
    result = run(
        "plan", "guides_for_cli:gpt", "--target", "auto", "--data", "guides_for_cli:batches",
        "--constraint", "params=8000,7000", "--candidate", "keep", "--candidate", "identity", "--yaml", "plan.yaml",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [thesean.Plan.from_yaml(f"plan-{k}.yaml").new_params <= bound for k, bound in ((1, 8000), (2, 7000))] == [
        True, True,
    ]  # fmt: skip
    assert "thesean convert guides_for_cli:gpt --plan plan-2.yaml" in result.output


def test_a_budget_without_auto_and_auto_without_a_budget_are_refused(guides: Path) -> None:
    command = ("plan", "guides_for_cli:gpt", "--data", "guides_for_cli:batches")
    assert "belong to --target auto" in error_of(run(*command, "--constraint", "params=8000"))
    assert "target 'auto' needs a budget" in error_of(run(*command, "--target", "auto"))
    assert "constraints: parms" in error_of(run(*command, "--target", "auto", "--constraint", "parms=8000"))


@pytest.mark.parametrize("option", ["--context", "--batch"])
@pytest.mark.parametrize("word", ["12,x", "0", "128,,512", "-1", "1.5"])
def test_sizes_that_are_no_numbers_stop_before_the_guide_is_loaded(guides: Path, option: str, word: str) -> None:
    message = error_of(run("plan", "guides_for_cli:broken", f"{option}={word}"))
    assert f"{option} '{word}': expected whole numbers of 1 or more with commas between" in message


def test_a_picture_of_an_unknown_format_stops_before_the_guide_is_loaded(guides: Path) -> None:
    message = error_of(run("plan", "guides_for_cli:broken", "--draw", "plan.gif"))
    assert "expected a name that ends in .svg or .png, found '.gif'" in message


@pytest.mark.thorough
def test_plan_measures_draws_and_tells_its_steps_on_stderr(guides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (payoff, part_timing):
        monkeypatch.setattr(module, "_SECONDS", 0.0)  # as few turns as a median takes: no time is looked at
    words = "plan guides_for_cli:mixer -t gru --data guides_for_cli:sequences --context 8,16 --draw plan.svg"
    result = run(*words.split())
    assert result.exit_code == 0, result.output
    assert "prefill of 8, batch 1" in result.stdout
    assert "token after 16, batch 1" in result.stdout
    assert "wrote plan.svg" in result.stdout
    assert "exported the guide" in result.stderr
    assert "mix.1" in (guides / "plan.svg").read_text()


def test_activations_are_written_once_and_read_by_a_conversion(guides: Path) -> None:
    words = "activations guides_for_cli:mixer -t gru --data guides_for_cli:sequences --out kept"
    told = run(*words.split())
    assert told.exit_code == 0, told.output
    assert told.output.startswith("wrote kept: 4 batches, 4 of them new, ")
    assert run(*words.split()).output.startswith("wrote kept: 4 batches, 0 of them new, ")
    words = "convert guides_for_cli:mixer -t gru --data guides_for_cli:sequences --out made --quiet --budget 8 --cache"
    assert run(*words.split(), "kept").exit_code == 0
    report = json.loads((guides / "made" / "report.json").read_text(encoding="utf-8"))
    assert any(note.endswith("steps: its activations were saved") for note in report["notes"])
    assert "expected a folder of activations" in error_of(run(*words.split(), "nowhere"))
    assert "target 'auto' has no parts before it has chosen" in error_of(
        run(
            *[
                "activations",
                "guides_for_cli:mixer",
                "-t",
                "auto",
                "--data",
                "guides_for_cli:sequences",
                "--out",
                "other",
            ]
        )
    )
