from __future__ import annotations

from tests.targets.build import build


def test_parts_with_attention_become_linear_attention_on_its_projections(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts())
    module = build("rnn", part)
    assert module.family == "linear-attention"
    assert module.copy_from(part) == ("query", "key", "value", "output")


def test_parts_without_attention_become_gated_linear_recurrences(sequence_part):
    assert build("rnn", sequence_part()).family == "mingru"
    assert build("rnn", sequence_part("bidirectional")).family == "mingru"


def test_bidirectional_attention_stays_bidirectional(sequence_part, attention_facts):
    module = build("rnn", sequence_part("bidirectional", attention=attention_facts()))
    assert module.family == "linear-attention"
    assert not module.stateful


def test_width_reaches_the_family_that_was_picked(sequence_part):
    assert build("rnn", sequence_part(), width=24).last.in_features == 24
