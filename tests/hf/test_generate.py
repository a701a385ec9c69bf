"""B batch, T time"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.captured import shared
from tests.guides import ids
from tests.hf.converted import PAD, bounded, counted, padded, placed
from tests.tolerances import VALUE, relative_error
from thesean import hf
from thesean.errors import DataError
from thesean.hf.states import StateRows
from thesean.passes.graph.signature import InputSpec

MODELS = {
    "all replaced": bounded,
    "one attention kept": lambda: bounded("model.layers.0"),
    "positions of a table": counted,
    "positions among the inputs": placed,
}
NEW = 6


@shared
def model(name: str) -> Any:
    return hf.from_converted(MODELS[name]())


def settings(**more: Any) -> dict[str, Any]:
    return dict(max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=PAD, **{"do_sample": False, **more})


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_unequal_length_go_on_as_each_does_alone(name):
    network, prompts = model(name), padded(2, 5, 5, 9)
    made = network.generate(**prompts, **settings())
    for row, length in enumerate((2, 5, 5, 9)):
        ids_1T = prompts["input_ids"][row : row + 1, -length:]
        for _ in range(NEW):  # the whole is read again for each token, by the conversion itself
            steps_1T = torch.arange(ids_1T.shape[1]).unsqueeze(0)
            inputs = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T), "position_ids": steps_1T}
            inputs = {s.name: inputs[s.name] for s in network.signature.inputs}
            logits_1V = MODELS[name]()(**inputs).logits[:, -1]
            logits_1V[:, network.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens has it
            ids_1T = torch.cat([ids_1T, logits_1V.argmax(-1, keepdim=True)], 1)
        assert made[row, 9:].tolist() == ids_1T[0, length:].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_padded_prompts_give_the_same_logits_at_once_and_with_states(name):
    network, prompts = model(name), padded(2, 5, 9)
    shown = prompts["attention_mask"].bool()
    at_once, carried = (network(**prompts, use_cache=use).logits[shown] for use in (False, True))
    assert relative_error(carried, at_once) < VALUE[torch.float32]


def test_a_prompt_may_be_read_in_chunks():
    network, prompts = model("one attention kept"), padded(3, 7)
    at_once = network.generate(**prompts, **settings())
    assert torch.equal(network.generate(**prompts, **settings(), prefill_chunk_size=2), at_once)


@pytest.mark.parametrize(
    "drawing",
    [dict(num_beams=3, num_return_sequences=2, length_penalty=0.0), dict(do_sample=True, top_k=6, temperature=0.7)],
    ids=["beams", "sampling"],
)
def test_states_and_reading_all_again_write_the_same(drawing):
    network, written = model("one attention kept"), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        written.append(network.generate(**padded(3, 7), **settings(**drawing), use_cache=use_cache))
    assert torch.equal(*written)


def test_one_token_is_read_at_a_time():
    network, widths = model("all replaced"), []
    handle = network.stream.threaded.register_forward_pre_hook(
        lambda module, args, given: widths.append(given["input_ids"].shape), with_kwargs=True
    )
    network.generate(**padded(5, 5), **settings())
    handle.remove()
    assert widths == [(2, 5)] + [(2, 1)] * (NEW - 1)


def test_no_padding_is_ever_read():
    network, read = model("all replaced"), []
    handle = network.stream.threaded.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"]), with_kwargs=True
    )
    network(**padded(2, 9), use_cache=True)
    handle.remove()
    assert [tuple(x.shape) for x in read] == [(2, 2), (1, 7)]
    assert not any(bool((x == PAD).any()) for x in read)


def test_a_text_goes_on_from_the_states_of_an_earlier_call():
    network = model("one attention kept")
    first = network.generate(**padded(3, 6), **settings(), return_dict_in_generate=True)
    ids_BT = torch.cat([first.sequences, ids(2, 3, 9)], 1)
    mask_BT = torch.cat([padded(3, 6)["attention_mask"], torch.ones(2, ids_BT.shape[1] - 6, dtype=torch.long)], 1)
    anew = network.generate(ids_BT, attention_mask=mask_BT, **settings())
    went_on = network.generate(ids_BT, attention_mask=mask_BT, past_key_values=first.past_key_values, **settings())
    assert torch.equal(went_on, anew)


def test_hidden_steps_without_a_mask_among_the_inputs_change_nothing():
    network, prompts = model("positions of a table"), padded(4, 8)
    logits_BTV = network(**prompts).logits
    alone_TV = network(prompts["input_ids"][:1, 4:]).logits[0]
    assert relative_error(logits_BTV[0, 4:], alone_TV) < VALUE[torch.float32]
    assert not logits_BTV[0, :4].any()


def test_half_precision_decodes_with_states_and_counts_as_exactly():
    network = hf.from_converted(bounded("model.layers.0"))
    long_1T = ids(1, 400, 5)  # past 256 bfloat16 has no number for each position
    exact = network(long_1T).logits
    network.to(torch.bfloat16)
    whole = network(long_1T).logits.float()
    assert network.stream is not None
    start = network(long_1T[:, :300], use_cache=True)
    end = network(long_1T[:, 300:], past_key_values=start.past_key_values)
    in_chunks = torch.cat([start.logits, end.logits], 1).float()
    early, late = (relative_error(whole[:, part], exact[:, part]) for part in (slice(0, 100), slice(300, 400)))
    assert late < 1.5 * early
    assert relative_error(in_chunks, exact) < 1.5 * relative_error(whole, exact)


def test_rows_with_a_shorter_past_get_steps_in_front_that_hold_no_token():
    specs = [
        InputSpec(name="seen", dtype=torch.bool, shape=("batch", "past")),
        InputSpec(name="keys", dtype=torch.float32, shape=("batch", 1, "past", 1)),
        InputSpec(name="sum", dtype=torch.float32, shape=("batch", 1)),
    ]
    rows, states = StateRows(specs), []
    for length in (1, 3):
        keys = torch.arange(1.0, length + 1).view(1, 1, length, 1)
        states.append({"seen": torch.ones(1, length).bool(), "keys": keys, "sum": keys.sum().view(1, 1)})
    joined = rows.join(states)
    assert joined["seen"].tolist() == [[False, False, True], [True, True, True]]
    assert joined["keys"].flatten(1).tolist() == [[0, 0, 1], [1, 2, 3]]
    assert rows.take(joined, torch.tensor([1]))["sum"].tolist() == [[6]]
    assert rows.joins
    assert not StateRows(specs[1:]).joins  # nothing would tell the steps in front from tokens


def test_the_cache_of_another_network_is_refused():
    past = model("all replaced")(ids(2, 3, 0), use_cache=True).past_key_values
    with pytest.raises(DataError, match="past_key_values: expected what this network's"):
        model("positions of a table")(ids(2, 3, 0), past_key_values=past)
    with pytest.raises(DataError, match="of 2 rows, input_ids of 1"):
        model("all replaced")(ids(1, 3, 0), past_key_values=past)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (dict(cache_implementation="static"), "cache_implementation: expected 'dynamic'"),
        (dict(output_hidden_states=True), "output_hidden_states: a graph has the outputs that the guide"),
        (dict(inputs=torch.tensor([[1, 2, 99]])), "input_ids holds 99; expected ids from 0 to 31"),
    ],
)
def test_what_it_cannot_do_is_told(wrong, told):
    given = {"inputs": ids(1, 3, 0), "attention_mask": torch.ones(1, 3, dtype=torch.long), **wrong}
    with pytest.raises(DataError, match=told):
        model("all replaced").generate(**given, **settings())


def test_a_pipeline_writes_text():
    from transformers import pipeline

    from tests.hf.converted import tokenizer

    reader = tokenizer()
    write = pipeline("text-generation", model=model("all replaced"), tokenizer=reader)
    made = write(["w1 w2 w3", "w5 w6 w7 w8 w9"], batch_size=2, return_full_text=False, **settings())
    alone = write("w1 w2 w3", return_full_text=False, **settings())
    assert made[0] == alone
    given = reader("w1 w2 w3", return_tensors="pt")
    new = model("all replaced").generate(**given, **settings())[0, given["input_ids"].shape[1] :]
    assert len(new) == NEW
    assert alone[0]["generated_text"].split() == reader.decode(new, skip_special_tokens=True).split()
