"""Rivals are what their papers say: what each start does where the answer is known."""

from __future__ import annotations

import copy
import dataclasses
import struct
import zlib

import pytest
import torch
from torch import nn

from benchmarks.rivalry import novels, students, train
from benchmarks.rivalry.blocks import BERT, GPT2, Layout, keep_blocks
from benchmarks.rivalry.methods import Sizes
from benchmarks.rivalry.subjects import SentenceEncoder, Subject, encoded, sentences
from benchmarks.rivalry.table import table
from benchmarks.rivalry.timing import bound_of, sizes_within
from benchmarks.suite import BenchmarkError


def subject(layout: Layout, guide: nn.Module) -> Subject:
    """On random tokens, rows padded where the guide reads a mask."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 32, (3, 9), generator=generator) for _ in range(4)]
    mask_BT = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    batches = [{"input_ids": x} | ({"attention_mask": mask_BT} if layout is BERT else {}) for x in ids]
    return Subject(
        name="small", guide=guide, layout=layout, data=lambda seed: batches, chosen_by=batches,
        judged={"all": batches},
        output=lambda model, batch: getattr(out := model(**batch), "logits", out),
        distance=lambda own, wanted, batch: (own - wanted).square().mean(),
        task=lambda own, wanted, batch: (own - wanted).square().mean(),
        seen=lambda x, batch: x[batch["attention_mask"].bool()] if layout is BERT else x.flatten(0, 1),
        figures=lambda own, wanted, batches: {"off": (torch.cat(own) - torch.cat(wanted)).abs().max().item()},
        compile={}, inputs=dict, steps=3, speedup=1.5, context=9,
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> Subject:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    return subject(BERT, SentenceEncoder(BertModel(config, add_pooling_layer=False)).eval())


@pytest.fixture(scope="module")
def decoder() -> Subject:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=4, n_head=4, initializer_range=0.3, use_cache=False
    )
    return subject(GPT2, GPT2LMHeadModel(config).eval())


def off(given: Subject, model: nn.Module) -> float:
    with torch.no_grad():
        return max((given.output(model, b) - given.output(given.guide, b)).abs().max().item() for b in given.data(0))


def idle(given: Subject, block: int) -> Subject:
    """The same guide, in which this block gives what it reads."""
    guide = copy.deepcopy(given.guide)
    its = given.layout.blocks(guide)[block]
    with torch.no_grad():
        for linear in (given.layout.attention_output(its), given.layout.mlp(its)[1]):
            linear.weight.zero_()
            linear.bias.zero_()
    return dataclasses.replace(given, guide=guide, known={})


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_all_blocks_heads_and_neurons_are_the_guide_itself(kind, request):
    given = request.getfixturevalue(kind)
    blocks = list(given.layout.blocks(given.guide))
    neurons = len(given.layout.mlp(blocks[0])[0].bias)
    whole = keep_blocks(given.guide, given.layout, range(len(blocks)))
    assert off(given, whole) == 0
    assert off(given, students.narrowed(given, given.data(0), 4, neurons).model) < 1e-5
    assert off(given, students.silenced(given, range(len(blocks))).model) == 0


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_pruning_takes_the_heads_and_neurons_that_do_least(kind, request):
    given = request.getfixturevalue(kind)
    guide = copy.deepcopy(given.guide)
    with torch.no_grad():
        for block in given.layout.blocks(guide):
            up = given.layout.mlp(block)[0]
            weight = up.weight if isinstance(up, nn.Linear) else up.weight.T
            weight[5:] = 0.0  # gelu(0) = 0: nothing comes out of these
            up.bias[5:] = 0.0
    quiet = dataclasses.replace(given, guide=guide, known={})
    assert off(quiet, students.narrowed(quiet, quiet.data(0), 4, 5).model) < 1e-5


def test_a_block_that_does_nothing_has_no_influence_and_goes_first(decoder):
    given = idle(decoder, 2)
    scores = students.influence(given, given.data(0))
    assert scores[2] == pytest.approx(0, abs=1e-6)
    assert min(scores[:2] + scores[3:]) > 1e-3
    student = students.least_influence(given, given.data(0), 3)
    assert student.ends == (0, 1, 3)
    assert off(given, student.model) < 1e-4


def test_the_map_in_place_of_blocks_that_are_one_is_exact(decoder):
    # a block without attention whose MLP's output is a linear map of the MLP's before it can't be told from that map
    given = idle(decoder, 2)
    student = students.replaced_by_a_map(given, given.data(0), 3)
    assert student.ends == (0, 2, 3)
    assert off(given, student.model) < 0.01 * given.output(given.guide, given.data(0)[0]).abs().max().item()


def test_the_map_is_nearer_than_the_blocks_left_out(encoder):
    data = encoder.data(0)
    student = students.replaced_by_a_map(encoder, data, 2)
    kept = [end - 1 if k == 0 else end for k, end in enumerate(student.ends)]
    plain = keep_blocks(encoder.guide, encoder.layout, sorted({0, kept[-1]}))
    assert off(encoder, student.model) < off(encoder, plain)


def test_the_attention_whose_return_brings_the_guide_back_is_first(decoder):
    guide = copy.deepcopy(decoder.guide)
    with torch.no_grad():
        for k in (0, 1, 3):
            output = GPT2.attention_output(GPT2.blocks(guide)[k])
            output.weight.zero_()
            output.bias.zero_()
    given = dataclasses.replace(decoder, guide=guide, known={})
    order = students.attentions_by_return(given, given.data(0))
    assert sorted(order) == [0, 1, 2, 3]
    assert order[0] == 2
    assert off(given, students.silenced(given, order[:1]).model) < 1e-5


def test_swapping_trains_the_successors_and_leaves_the_guide(decoder):
    before = copy.deepcopy(decoder.guide.state_dict())
    student = train.first_of_groups(decoder, decoder.data(0), 3)
    assert student.ends == (1, 2, 3)
    trained, seconds = train.swap(decoder, student, train.outputs, decoder.data(0), 1e-2, 0)
    assert seconds > 0
    changed = {n for n, p in trained.model.named_parameters() if not torch.equal(p, student.model.state_dict()[n])}
    assert changed
    assert all(".h." in name for name in changed)
    assert all(torch.equal(v, before[n]) for n, v in decoder.guide.state_dict().items())


@pytest.mark.parametrize(
    "objective", [train.outputs, train.outputs_and_last_state, train.outputs_and_states, train.hints_then_outputs]
)
def test_each_objective_is_zero_at_the_guide_and_falls_from_elsewhere(objective, encoder):
    batch = encoder.data(0)[0]
    whole = students.copied(encoder, 3)
    assert objective(encoder, whole, batch, 0.0).item() == pytest.approx(0, abs=1e-6)
    longer = dataclasses.replace(encoder, steps=30)
    student = students.copied(encoder, 2)
    trained, _ = train.train(longer, student, objective, encoder.data(0), 1e-3, 0)
    done = 0.0 if objective is train.hints_then_outputs else 1.0
    with torch.no_grad():
        first, last = (objective(encoder, s, batch, done).item() for s in (student, trained))
    assert last < first


MS = {"guide": 9.0, "blocks 2": 5.0, "blocks 1": 3.0, "pruned 8": 5.5, "pruned 6": 6.3, "pruned 4": 4.0,
      "narrow both 8": 5.0, "narrow both 4": 4.0, "narrow 8": 7.0, "narrow 4": 6.0, "attentions 1": 8.0}  # fmt: skip


def test_each_kind_is_as_large_as_the_bound_allows(encoder):
    ms = {name: {"ms": 7.0, "p20": value} for name, value in MS.items()}
    assert bound_of(encoder, ms) == 6.0
    assert sizes_within(encoder, ms, {"heads": 3}) == Sizes(2, 3, 8, 4, 1)
    # so near to the bound that a median can't tell: then it is the others' bound too
    assert bound_of(encoder, ms | {"blocks 2": {"ms": 7.0, "p20": 6.1}}) == 6.1


def test_the_table_names_who_is_ahead_of_ours():
    def row(name, start, tuned, **more):
        given = {"start": {"all": {"nats": start}}, "tuned": {"all": {"nats": tuned}}}
        return {"name": name, "seed": 0, "shape": "blocks 2", "params": 9, **given, **more}

    cost = {"start_cpu_s": 1.0, "cpu_s": 2.0}
    ms = {"guide": 9.0, "blocks 2": 5.0, "int8": 8.0}
    known = {
        "ms": {name: {"ms": v, "p20": v, "p80": v} for name, v in ms.items()},
        "guide": {"all": {"nats": 1.0}}, "int8": {"all": {"nats": 1.1}}, "params": 9, "steps": 4, "context": 9,
        "speedup": 1.5,
    }  # fmt: skip
    rows = [row("ours: auto", 1.5, 1.3, **cost), row("first", 1.4, 1.4, rate=1e-3, **cost)]
    text = table({"details": known, "cases": rows})
    assert "Before any step, all, nats: our best is auto (1.500); ahead of it: first (1.400)." in text
    assert "After the steps, all, nats: our best is auto (1.300); ahead of it: nobody." in text
    assert text.index("**ours: auto**") < text.index("| first |")


def test_sentences_are_cut_where_they_end_and_batches_are_of_like_length():
    text = 'It was a dark night. "Was it so?" He said that\nit was so. No. It was a dark night.'
    assert sentences(text) == ["It was a dark night.", "He said that it was so."]

    def tokenizer(texts, **_):
        long = max(map(len, texts))
        ids = torch.tensor([[1] * len(t) + [0] * (long - len(t)) for t in texts])
        return {"input_ids": ids, "attention_mask": ids}

    made = encoded(tokenizer, ["a" * n for n in (9, 2, 8, 1, 7, 3, 6, 4)], 2)
    assert sum(b["input_ids"].numel() for b in made) == 2 * (2 + 4 + 7 + 9)
    assert sum(int(b["attention_mask"].sum()) for b in made) == 9 + 2 + 8 + 1 + 7 + 3 + 6 + 4


def test_novels_are_read_out_of_rs_database(tmp_path, monkeypatch):
    def packed(*lines: str) -> bytes:
        words = b"".join(b"\x00\x04\x00\x09" + struct.pack(">i", len(w.encode())) + w.encode() for w in lines)
        data = b"X\n" + b"\x00" * 12 + b"\x00\x00\x00\x10" + struct.pack(">i", len(lines)) + words
        return struct.pack(">i", len(data)) + zlib.compress(data)

    path = tmp_path / "Rdata.rdb"
    monkeypatch.setattr(novels, "database", lambda: path)
    novels.novels.cache_clear()
    path.write_bytes(packed("", "PERSUASION", "She sat.") + packed("NORTHANGER ABBEY", "Café.") + packed("Emma", "x"))
    found = novels.novels()
    assert list(found) == ["Emma", "Northanger Abbey", "Persuasion"]
    assert found["Northanger Abbey"] == "NORTHANGER ABBEY\nCafé."
    novels.novels.cache_clear()
    path.write_bytes(packed("Emma", "x"))
    with pytest.raises(BenchmarkError, match="expected 'Northanger Abbey' among the novels, found Emma"):
        novels.novels()
    monkeypatch.setattr(novels, "database", lambda: None)
    novels.novels.cache_clear()
    with pytest.raises(BenchmarkError, match="not installed"):
        novels.novels()
    novels.novels.cache_clear()
