"""B batch, T time, D width"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from tests import models
from tests.captured import KERNELS
from tests.models import tokens, vectors
from thesean.errors import CaptureError, DataError
from thesean.passes.capture.capture import capture


@torch.no_grad()
def same_everywhere(model: nn.Module, captured, sizes, make) -> None:
    for size in sizes:
        x = make(*size)
        expected = model(x)
        expected = expected if isinstance(expected, torch.Tensor) else next(iter(expected.values()))
        actual = captured.graph_module(x)
        actual = actual if isinstance(actual, torch.Tensor) else next(iter(actual.values()))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("make", [models.gpt2, models.bert, pytest.param(models.llama, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("attention", KERNELS)
def test_a_language_model_runs_at_sizes_that_it_was_not_traced_with(make, attention):
    model = make(layers=1, attention=attention)
    same_everywhere(model, capture(model, tokens(4, 10)), [(1, 1), (2, 7), (5, 3), (3, 40)], tokens)


def test_an_encoder_runs_at_sizes_that_it_was_not_traced_with():
    model = models.encoder()
    captured = capture(model, vectors(2, 6, 16))
    same_everywhere(model, captured, [(1, 1), (3, 11)], lambda b, t: vectors(b, t, 16))


def test_a_convnet_runs_at_batches_that_it_was_not_traced_with():
    model = models.resnet()
    captured = capture(model, vectors(2, 1, 8, 8))
    same_everywhere(model, captured, [(1,), (5,)], lambda b: vectors(b, 1, 8, 8))
    assert captured.signature.inputs[0].shape == ("batch", 1, 8, 8)


def test_a_batch_and_a_sequence_of_one_do_not_become_fixed_sizes():
    model = models.gpt2(layers=1)
    captured = capture(model, tokens(1, 1))
    assert captured.signature.symbols == ("batch", "time")
    same_everywhere(model, captured, [(3, 5)], tokens)


def test_a_length_that_the_guide_fixes_stays_fixed_and_the_batch_stays_free():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5 * 4, 3)).eval()
    captured = capture(model, vectors(2, 5, 4))
    assert captured.signature.inputs[0].shape == ("batch", 5, 4)
    same_everywhere(model, captured, [(7,)], lambda b: vectors(b, 5, 4))


class Heard(nn.Module):
    """signal_BCT with a head of as many channels, and ids_BT that are read beside it."""

    def __init__(self, free: bool) -> None:
        super().__init__()
        self.free = free
        self.bands, self.words = nn.Conv1d(8, 4, 3), nn.Embedding(32, 4)
        self.last = nn.Linear(4, 4) if free else nn.Linear(5 * 4, 4)

    def forward(self, signal: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x_BTD = self.words(ids) + self.bands(signal).mean(2).unsqueeze(1)
        return self.last(x_BTD if self.free else x_BTD.flatten(1))


@pytest.mark.parametrize(("free", "length"), [(True, "time"), (False, 5)])
def test_a_size_that_the_guide_fixes_leaves_other_inputs_lengths_free(free, length):
    given = vectors(2, 8, 12), tokens(2, 5)
    captured = capture(models.seeded(Heard, free).eval(), given)
    signal, ids = captured.signature.inputs
    assert (signal.shape, ids.shape) == (("batch", 8, 12), ("batch", length))
    if free:
        with torch.no_grad():
            model, other = models.seeded(Heard, free).eval(), (vectors(3, 8, 12, seed=1), tokens(3, 9))
            torch.testing.assert_close(captured.graph_module(*other), model(*other))


@pytest.mark.thorough
def test_a_length_that_is_free_only_in_steps_is_fixed():
    """A window of 4 with a stride of 4 gives three positions for lengths of 12 to 15, and the table has three."""

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.windows = nn.Conv1d(8, 8, 4, stride=4)
            self.table = nn.Parameter(torch.randn(1, 3, 8))
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.windows(x.transpose(1, 2)).transpose(1, 2) + self.table)

    model = Windowed().eval()
    captured = capture(model, vectors(2, 12, 8))
    assert captured.signature.inputs[0].shape == ("batch", 12, 8)
    same_everywhere(model, captured, [(1,), (5,)], lambda b: vectors(b, 12, 8))


def test_a_padding_mask_is_an_input_that_counts():
    model = models.bert(layers=1)
    mask_BT = torch.ones(3, 8, dtype=torch.long)
    captured = capture(model, {"attention_mask": mask_BT, "input_ids": tokens(3, 8)})
    assert [s.name for s in captured.signature.inputs] == ["input_ids", "attention_mask"]
    ids_BT, padded_BT = tokens(2, 12, seed=3), torch.ones(2, 12, dtype=torch.long)
    padded_BT[1, 7:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids_BT, attention_mask=padded_BT).last_hidden_state
        actual = captured.graph_module(ids_BT, padded_BT)["last_hidden_state"]
        unpadded = captured.graph_module(ids_BT, torch.ones_like(padded_BT))["last_hidden_state"]
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(unpadded[1], expected[1])


def test_the_signature_tells_names_types_tables_and_output_class():
    signature = capture(models.gpt2(layers=1), tokens()).signature
    (ids,) = signature.inputs
    assert (ids.name, ids.dtype, ids.shape, ids.high) == (
        "input_ids",
        torch.int64,
        ("batch", "time"),
        models.VOCABULARY,
    )
    assert signature.output_class == "transformers.modeling_outputs.CausalLMOutputWithCrossAttentions"


def test_models_with_a_cache_are_captured_without_it():
    model = models.gpt2(layers=1, use_cache=True)
    with torch.no_grad():
        assert "past_key_values" in model(tokens())
    output = capture(model, tokens()).graph_module(tokens())
    assert set(output) == {"logits"}


def test_each_module_gets_its_own_training_flag_back():
    model = models.encoder().train()
    model.encoder.layers[0].eval()
    before = [m.training for m in model.modules()]
    capture(model, vectors(2, 6, 16))
    assert [m.training for m in model.modules()] == before


def test_flags_come_back_after_a_failure_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    with pytest.raises(DataError):
        capture(model, vectors(2, 5))
    assert all(m.training for m in model.modules())


def test_the_guide_is_traced_in_eval_mode_and_keeps_its_parameters():
    model = models.resnet().train()
    before = models.state_of(model)
    captured = capture(model, vectors(4, 1, 8, 8))
    assert models.same_state(model, before)  # batch-norm statistics too
    model.eval()
    same_everywhere(model, captured, [(3,)], lambda b: vectors(b, 1, 8, 8))
    shared = {id(p) for p in model.parameters()}
    assert {id(p) for p in captured.graph_module.parameters()} == shared


def test_tied_weights_stay_one_parameter():
    model = models.gpt2(layers=1)
    captured = capture(model, tokens())
    assert sum(p.numel() for p in captured.graph_module.parameters()) == sum(p.numel() for p in model.parameters())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        if h.sum() > 0:  # the line that the error names
            return h
        return -h


def test_control_flow_that_depends_on_values_names_this_file_and_the_line():
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = next(n for n, text in enumerate(lines, 1) if text.endswith("# the line that the error names"))
    with pytest.raises(CaptureError, match=f"{Path(__file__).name}, line {line}, in forward: if h.sum") as caught:
        capture(Branching(), vectors(2, 4))
    assert "submodule" in str(caught.value)


class Flexible(nn.Module):
    """x_BTD attends to itself by torch's flex_attention, which has no derivative on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.weight(x).unsqueeze(1)
        return flex_attention(query, query, query)  # a call that torch refuses


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_an_operator_that_torch_does_not_have_here_is_not_blamed_on_control_flow():
    with pytest.raises(CaptureError, match="# a call that torch refuses") as caught:
        capture(Flexible().eval(), vectors(2, 5, 4))
    assert "torch has no such form of flex_attention: have forward use another one" in str(caught.value)
    assert "Control flow" not in str(caught.value)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.cell = cell(4, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0])


@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])
def test_recurrent_guides_run_at_any_length_and_are_as_they_were(cell):
    model = models.seeded(Recurrent, cell)
    expected = model(vectors(2, 6, 4))
    captured = capture(model, vectors(2, 6, 4))
    torch.testing.assert_close(model(vectors(2, 6, 4)), expected)
    assert captured.signature.inputs[0].shape == ("batch", "time", 4)
    same_everywhere(model, captured, [(5, 6), (2, 11), (1, 1)], lambda b, t: vectors(b, t, 4))


class Counting(nn.Module):
    """Writes to a buffer in forward, in eval mode too."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.layer(x)


def test_buffers_that_a_forward_writes_to_are_as_they_were():
    model = Counting()
    capture(model, vectors(2, 4))
    assert model.calls == 0


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_a_guide_that_is_random_in_eval_mode_is_refused():
    with pytest.raises(CaptureError, match="random"):
        capture(Random(), vectors(2, 4))


RUNS: list[torch.Size] = []


class Centred(nn.Module):
    """Rows read each other where they are `centred`."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.linear, self.centred = nn.Linear(4, 4), centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RUNS.append(x.shape)
        return self.linear(x - x.mean(0) if self.centred else x)


def test_the_guide_is_run_on_some_rows_of_the_example_only_where_the_others_count():
    runs, apart = [], []
    for centred, rows in ((False, 4), (True, 4), (False, 2)):
        RUNS.clear()
        found = capture(Centred(centred), vectors(rows, 4)).graph_module
        runs.append(len(RUNS))
        apart.append(found.meta.get("rows_apart"))
    assert runs[1] == runs[0] + 1
    assert apart == [True, None, False]  # of an example of two rows nothing was left out


def test_of_an_example_that_was_doubled_one_row_is_looked_at():
    captured = capture(models.encoder(), vectors(1, 6, 16))
    ((name, doubled),) = captured.example.items()
    assert doubled.shape[0] == 2
    torch.testing.assert_close(captured.distinct_rows()[name], doubled[:1])
    captured = capture(models.encoder(), vectors(2, 6, 16))
    assert captured.distinct_rows() is captured.example


def test_a_torchscript_module_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit itself
        scripted = torch.jit.trace(models.mlp(), vectors(2, 8))
    with pytest.raises(CaptureError, match="TorchScript"):
        capture(scripted, vectors(2, 8))


def test_what_is_not_a_module_is_refused():
    with pytest.raises(CaptureError, match="found function"):
        capture(lambda x: x, vectors(2, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_another_type_are_taken_as_they_are_and_told(dtype):
    captured = capture(models.mlp().to(dtype), vectors(2, 8).to(dtype))
    assert captured.notes == (f"weights in {str(dtype).removeprefix('torch.')}",)
    assert {p.dtype for p in captured.graph_module.parameters()} == {dtype}


def test_parameters_that_are_stored_and_not_computed_with_are_refused():
    model = models.mlp()
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(DataError, match=r"'0\.weight' is torch\.float8_e4m3fn.*Load the model in one of those"):
        capture(model, vectors(2, 8))


def test_a_guide_without_values_is_refused():
    with pytest.raises(DataError, match="meta device"):
        capture(models.mlp().to("meta"), vectors(2, 8))


def test_a_guide_on_two_devices_is_refused():
    model = models.mlp()
    model[0].to("meta")
    with pytest.raises(DataError, match=r"cpu.*meta"):
        capture(model, vectors(2, 8))


def test_inputs_on_another_device_are_refused():
    with pytest.raises(DataError, match="input 'input' is on meta, the guide on cpu"):
        capture(models.mlp(), vectors(2, 8).to("meta"))


def test_inputs_of_another_width_name_the_place_and_leave_the_reason():
    with pytest.raises(DataError, match=r"does not run on the example inputs.*shapes cannot be multiplied"):
        capture(models.mlp(), vectors(2, 7))


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (None, "no example inputs"),
        ((), "empty"),
        ({"pixels": vectors(2, 8)}, "takes no input 'pixels'"),
        ((vectors(2, 8), vectors(2, 8)), "takes 1 inputs by position, the example has 2"),
        (([1.0, 2.0],), "expected a tensor, found list"),
        (([[1, 2], [3, 4]],), "expected a tensor, found list. Make it one: .* return_tensors='pt'"),
        ((vectors(2, 8).numpy(),), "found ndarray. Make it one: torch.as_tensor"),
        ({"input": None}, "expected a tensor, found NoneType"),
        ("text", "expected a tensor, a tuple or a dict, found str"),
        (3, "found int"),
    ],
)
def test_examples_that_the_guide_does_not_take_are_refused(example, reason):
    with pytest.raises(DataError, match=reason):
        capture(models.mlp(), example)


def test_a_nested_output_keeps_its_nesting():
    model = models.seeded(models.TwoOutputs)
    captured = capture(model, vectors(3, 8))
    with torch.no_grad():
        actual, expected = captured.graph_module(vectors(2, 8)), model(vectors(2, 8))
    assert captured.signature.output_class is None
    assert isinstance(actual["second"], tuple)
    torch.testing.assert_close(actual, expected)


def test_two_inputs_are_taken_by_position_and_by_name():
    model = models.seeded(models.TwoInputs)
    left, right = vectors(3, 8), vectors(3, 8, seed=1)
    captured = capture(model, {"right": right, "left": left})
    with torch.no_grad():
        expected = model(left, right)
        torch.testing.assert_close(captured.graph_module(left, right), expected)
        torch.testing.assert_close(captured.graph_module(right=right, left=left), expected)


@dataclass
class Record:
    hidden: torch.Tensor
    missing: torch.Tensor | None
    pair: list[torch.Tensor]


torch.export.register_dataclass(Record, serialized_type_name="tests.Record")


class ReturnsRecord(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Record:
        hidden = self.layer(x)
        return Record(hidden=hidden, missing=None, pair=[hidden + 1, hidden * 2])


def test_a_dataclass_output_becomes_a_dict_and_its_class_is_remembered():
    model = models.seeded(ReturnsRecord)
    captured = capture(model, vectors(3, 4))
    with torch.no_grad():
        actual, expected = captured.graph_module(vectors(2, 4)), model(vectors(2, 4))
    assert captured.signature.output_class == f"{Record.__module__}.Record"
    assert actual["missing"] is None
    torch.testing.assert_close(actual["hidden"], expected.hidden)
    torch.testing.assert_close(actual["pair"], expected.pair)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + shift + rest["more"]


def test_keyword_only_and_open_ended_inputs_are_captured():
    model = models.seeded(Keywords)
    example = {"more": vectors(3, 4), "x": vectors(3, 4, seed=1), "shift": vectors(3, 4, seed=2)}
    captured = capture(model, example)
    inputs = {k: torch.cat([v, v]) for k, v in example.items()}
    with torch.no_grad():
        torch.testing.assert_close(captured.graph_module(**inputs), model(**inputs))


class Streaming(nn.Module):
    """A convolution that puts what it saw last before its input, in a buffer of its own."""

    past: torch.Tensor

    def __init__(self, assigned: bool) -> None:
        super().__init__()
        self.conv, self.assigned = nn.Conv1d(8, 8, 3), assigned
        self.register_buffer("past", torch.zeros(1, 8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.past.expand(x.shape[0], -1, -1), x], 2)
        if self.assigned:
            self.past = x[:1, :, -2:].detach()
        else:
            self.past.copy_(x[:1, :, -2:])
        return self.conv(x)


@pytest.mark.parametrize("assigned", [True, False])
def test_a_guide_that_remembers_its_last_call_is_refused_and_forgets_ours(assigned):
    model = nn.Sequential(nn.Conv1d(8, 8, 1), Streaming(assigned)).eval()
    past = model[1].past
    with pytest.raises(CaptureError, match=r"keeps a state from call to call in its buffers 1\.past"):
        capture(model, vectors(2, 8, 6))
    assert model[1].past is past
    assert not past.any()


class CountsCalls(nn.Module):
    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("nothing", torch.tensor(float("nan")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * 2


def test_a_buffer_that_no_output_depends_on_is_no_state():
    model = CountsCalls().eval()
    captured = capture(model, vectors(2, 3))
    x = vectors(4, 3)
    assert torch.equal(captured.graph_module(x), x * 2)
    assert model.calls == 0


class WritesIntoItsInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= x.mean(1, keepdim=True)
        x[:, 0] = 0
        return x * 2


def test_neither_capture_nor_the_graph_writes_into_what_it_is_given():
    given, model = vectors(3, 5, 4), WritesIntoItsInput().eval()
    captured = capture(model, given)
    assert torch.equal(given, vectors(3, 5, 4))
    for x in (vectors(3, 5, 4, seed=1), vectors(2, 7, 4)):
        kept = x.clone()
        found = captured.graph_module(x)
        assert torch.equal(x, kept)
        torch.testing.assert_close(found, model(kept))


class InAWrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids)


def test_a_cache_behind_a_wrapper_is_switched_off_for_the_trace_alone():
    inner = models.gpt2()
    inner.config.use_cache = True
    model = InAWrapper(inner).eval()
    captured = capture(model, tokens(2, 6))
    assert inner.config.use_cache is True
    assert set(captured.graph_module(tokens(2, 6))) == {"logits"}
    same_everywhere(model, captured, [(1, 1), (3, 9)], tokens)


class Remembering(InAWrapper):
    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.inner(input_ids, use_cache=True)


def test_a_cache_that_is_asked_for_is_told_with_what_leaves_it_out():
    with pytest.raises(CaptureError, match=r"returns a DynamicCache, and a graph gives tensors alone.*use_cache=False"):
        capture(Remembering(models.gpt2(1)), tokens(2, 6))


class CausalEncoder(nn.Module):
    """torch's own, with the causal mask that its documentation shows."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


def test_a_causal_mask_that_is_made_in_forward_is_no_branch_on_values():
    model = models.seeded(CausalEncoder)
    captured = capture(model, vectors(2, 6, 8))
    same_everywhere(model, captured, [(1, 1), (3, 9)], lambda batch, time: vectors(batch, time, 8))
    x, moved = vectors(1, 6, 8), vectors(1, 6, 8)
    moved[:, 4:] += 1
    change_BTD = captured.graph_module(x) - captured.graph_module(moved)
    assert not change_BTD[:, :4].any()
    assert change_BTD[:, 4:].any()


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0]


def test_packed_sequences_are_told_with_the_mask_that_stands_for_them():
    with pytest.raises(CaptureError, match=r"line \d+.*packed sequences.*by a mask.*lengths\[:, None\]"):
        capture(Packed(), (vectors(3, 5, 4), torch.tensor([5, 2, 4])))


class ClassToken(nn.Module):
    """Its batch is asked for in one of several ways, of which "len" is another file's."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.start, self.mix = way, nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = {"len": operator.length_hint, "number": lambda x: 3, "shape": lambda x: x.shape[0]}[self.way](x)
        x = torch.cat([self.start.expand(count, -1, -1), x], 1)
        return self.mix(x)[:, 1:]


@pytest.mark.parametrize("way", ["len", "number"])
def test_a_batch_that_the_guide_fixes_is_told_with_line_and_mend(way):
    with pytest.raises(CaptureError) as told:
        capture(ClassToken(way), vectors(3, 5, 4))
    message = str(told.value)
    assert "fixes dimension 0 of x (batch) at 3" in message
    assert "test_capture.py, line" in message
    assert ("write x.shape[0]" in message) == (way == "len")
    assert "torch.where" not in message
    assert "dynamic={}" in message
    fixed = capture(ClassToken(way), vectors(3, 5, 4), dynamic={})
    assert fixed.signature.inputs[0].shape == (3, 5, 4)
    free = capture(ClassToken(way), vectors(3, 5, 4), dynamic={"x": {1: "time"}})
    assert free.signature.inputs[0].shape == (3, "time", 4)


def test_watching_for_len_leaves_torch_as_it_was():
    original = torch.Tensor.__len__
    with pytest.raises(CaptureError):
        capture(ClassToken("len"), vectors(3, 5, 4))
    assert torch.Tensor.__len__ is original


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 6, 2, batch_first=True)

    def forward(self, x: torch.Tensor, h0: torch.Tensor) -> torch.Tensor:
        return self.cell(x, h0)[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_state_has_its_batch_where_the_other_input_has_its_size(batch):
    model = Stateful().eval()
    captured = capture(model, {"x": vectors(batch, 5, 4), "h0": vectors(2, batch, 6)})
    assert [s.shape for s in captured.signature.inputs] == [("batch", "time", 4), (2, "batch", 6)]
    x, h0 = vectors(5, 7, 4), vectors(2, 5, 6, seed=1)
    torch.testing.assert_close(captured.graph_module(x, h0), model(x, h0))


@pytest.mark.parametrize(
    ("dynamic", "reason"),
    [
        ({"y": {0: "batch"}}, "dynamic: the guide has no input 'y'; it has: x"),
        ({"x": {3: "time"}}, r"dynamic: 'x' has dimensions 0 to 2 \(shape \(3, 5, 4\)\), found 3"),
        ({"x": {0: 4}}, r'dynamic: expected a name such as "batch" or "time" for x\[0\], found 4'),
    ],
)
def test_dynamic_dimensions_that_are_not_there_are_refused(dynamic, reason):
    with pytest.raises(DataError, match=reason):
        capture(ClassToken("shape"), vectors(3, 5, 4), dynamic=dynamic)


@pytest.mark.parametrize(("commit", "told"), [("0a1b2c", "0a1b2c"), (7, None)])
def test_the_commit_that_a_configuration_tells_of_the_weights_is_kept(commit, told):
    model = models.gpt2(layers=1)
    model.config._commit_hash = commit
    assert capture(model, tokens(2, 5)).signature.origin.commit == told
