from __future__ import annotations

import pytest

from thesean.cli.words import (
    ArgumentError,
    load_object,
    parse_budget,
    parse_dynamic,
    parse_outputs,
    parse_target,
    parse_targets,
)
from thesean.targets.shared.family import Target


def test_a_name_alone_stays_a_name() -> None:
    assert parse_targets(["rnn"]) == "rnn"


def test_options_after_the_colon_are_read_as_yaml_scalars() -> None:
    target = parse_target("gru:width=256,scope=part,rate=0.5,bias=true,kind=wide")
    assert target == Target("gru", scope="part", width=256, rate=0.5, bias=True, kind="wide")


def test_an_option_alone_is_not_taken_for_a_glob() -> None:
    assert parse_targets(["gru:width=256"]) == Target("gru", width=256)


def test_globs_make_a_mapping_in_the_order_given() -> None:
    mapping = parse_targets(["h.0=keep", "h.[1-3]=rnn", "h.*=gru:width=8"])
    assert isinstance(mapping, dict)
    assert list(mapping.items()) == [("h.0", "keep"), ("h.[1-3]", "rnn"), ("h.*", Target("gru", width=8))]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["rnn", "h.0=keep"], "each needs its parts, GLOB=NAME"),
        (["h.0=rnn", "h.0=gru"], "given twice"),
        (["keep"], "everything kept is no conversion"),
        (["h.0=keep:width=2"], "takes no options"),
        (["=rnn"], "found no glob"),
        ([":width=2"], "found no name"),
        (["h.0="], "found no name"),
        (["gru:width"], "expected key=value"),
        (["gru:"], "expected key=value"),
        (["gru:width=1,width=2"], "given twice"),
        (["gru:scope=all"], "scope=mixing, scope=token-wise or scope=part"),
        (["gru:build=x"], "not an option"),
    ],
)
def test_a_malformed_target_says_what_is_wrong(words: list[str], reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        parse_targets(words)


def test_an_object_is_found_by_dotted_name_and_called_only_when_asked() -> None:
    assert load_object("collections:abc.Iterable.__name__", "--x", call=False) == "Iterable"
    assert load_object("collections:OrderedDict", "--x", call=True) == {}
    assert load_object("collections:OrderedDict", "--x", call=False) is __import__("collections").OrderedDict


@pytest.mark.parametrize("word", ["json", "json:", ":dumps", ""])
def test_a_word_without_module_or_name_is_refused(word: str) -> None:
    with pytest.raises(ArgumentError, match=r"expected package\.module:name"):
        load_object(word, "--loss", call=False)


def test_an_import_that_fails_inside_the_module_is_not_called_a_missing_module(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with open("imports_nothing_good.py", "w") as file:
        file.write("import nowhere_at_all\n")
    with pytest.raises(ArgumentError, match="raised ModuleNotFoundError: No module named 'nowhere_at_all'"):
        load_object("imports_nothing_good:x", "guide", call=True)


def test_a_budget_is_read_as_yaml_reads_it():
    assert parse_budget(["latency_ms=5.5", "context=512", "kind=token"]) == {
        "latency_ms": 5.5,
        "context": 512,
        "kind": "token",
    }
    assert parse_budget([]) is None


def test_several_values_of_one_key_are_several_budgets():
    assert parse_budget(["speedup=1.25,1.5", "context=512"]) == [
        {"speedup": 1.25, "context": 512},
        {"speedup": 1.5, "context": 512},
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["latency_ms"], "expected key=value"),
        (["a=1", "a=2"], "'a' is given twice"),
        (["=3"], "expected key=value"),
        (["a=1,"], "expected key=value"),
        (["a=1,2", "b=1,2"], "a and b have several"),
    ],
)
def test_a_malformed_budget_says_what_is_wrong(words, message):
    with pytest.raises(ArgumentError, match=message):
        parse_budget(words)


def test_outputs_are_names_and_how_they_are_compared() -> None:
    assert parse_outputs([]) is None
    assert parse_outputs(["logits=softmax", "heads.value=mse"]) == {"logits": "softmax", "heads.value": "mse"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["logits"], "expected NAME=KIND"),
        (["=mse"], "expected NAME=KIND"),
        (["logits=kl"], "of softmax, sigmoid, mse, ignore"),
        (["a=mse", "a=ignore"], "'a' is given twice"),
    ],
)
def test_a_malformed_output_says_what_is_wrong(words: list[str], reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        parse_outputs(words)


def test_free_dimensions_are_numbers_and_names_of_inputs() -> None:
    assert parse_dynamic([]) is None
    assert parse_dynamic(["none"]) == {}
    assert parse_dynamic(["x=1:time"]) == {"x": {1: "time"}}
    assert parse_dynamic(["x=0:batch, 1:time", "y=0:batch", "x=2:wide"]) == {
        "x": {0: "batch", 1: "time", 2: "wide"},
        "y": {0: "batch"},
    }


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["x"], "expected INPUT=DIMENSION:NAME"),
        (["x="], "found ''"),
        (["x=time"], "found 'time'"),
        (["x=1:"], "found '1:'"),
        (["x=-1:time"], "found '-1:time'"),
        (["none", "x=1:time"], "expected INPUT=DIMENSION:NAME"),
        (["x=1:time,1:batch"], "dimension 1 of 'x' is given twice"),
    ],
)
def test_a_malformed_dimension_says_what_is_wrong(words: list[str], reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        parse_dynamic(words)
