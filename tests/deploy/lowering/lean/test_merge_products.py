"""Two products in a row as one, and one that a recurrent cell's gates read as theirs."""

from __future__ import annotations

import pytest

from tests.deploy.lowering.lean.test_lean import X, after, built
from thesean.deploy.lowering.lean.merge_products import merge_products

# (B, T, 8) -> 8 -> 6, with biases
ROW = """g (float[batch, time, 8] x, float[8, {between}] A, float[{between}] C, float[{between}, 6] B, float[6] D)
    => (float[batch, time, 6] y{more})
{{
    a = MatMul (x, A)
    b = Add (a, C)
    c = MatMul (b, B)
    y = Add ({sum})
{end}}}"""


def row(between: int = 8, sum: str = "c, D", more: str = "", end: str = "") -> str:
    return ROW.format(between=between, sum=sum, more=more, end=end)


@pytest.mark.parametrize("sum", ["c, D", "D, c"])
def test_two_products_are_one_and_so_are_their_biases(sum):
    assert after(row(sum=sum), merge_products) == ["MatMul", "Add"]
    model = built(row(sum=sum))
    merge_products(model)
    assert sorted(tuple(v.shape.numpy()) for v in model.graph.initializers.values()) == [(6,), (8, 6)]


def test_what_is_no_bias_stays_a_sum():
    text = row(sum="c, c")
    assert after(text, merge_products) == ["MatMul", "Add", "Add"]


def test_a_narrow_middle_stays():
    assert after(row(between=2), merge_products, 0) == ["MatMul", "Add", "MatMul", "Add"]


def test_a_middle_that_others_read_stays():
    text = row(more=", float[batch, time, 8] z", end="    z = Relu (b)\n")
    assert after(text, merge_products, 0) == ["MatMul", "Add", "MatMul", "Add", "Relu"]


def test_a_middle_that_is_given_away_stays():
    text = row(more=", float[batch, time, 8] b")
    assert after(text, merge_products, 0) == ["MatMul", "Add", "MatMul", "Add"]


# (B, T, 8) -> 8 -> a cell of 3 units
CELL = """g ({x}, float[8, 8] A, float[8] C, float[{dirs}, {gates}, 8] W, float[{dirs}, {gates}, 3] R{weight})
    => (float[time, {dirs}, batch, 3] y)
{{
    {first}
    a = MatMul ({read}, A)
    b = Add (a, C)
    t = Transpose <perm = [1, 0, 2]> (b)
    y = {kind} <hidden_size = 3{way}> (t, W, R{bias})
}}"""


def cell(kind: str, gates: int, biased: bool = True, turned: bool = False, dirs: int = 1) -> str:
    return CELL.format(
        kind=kind, gates=3 * gates, dirs=dirs, bias=", B" if biased else "",
        weight=f", float[{dirs}, {6 * gates}] B" if biased else "",
        x="float[time, batch, 8] x" if turned else X, read="s" if turned else "x",
        first="s = Transpose <perm = [1, 0, 2]> (x)" if turned else "",
        way=', direction = "bidirectional"' if dirs == 2 else "",
    )  # fmt: skip


@pytest.mark.parametrize("dirs", [1, 2])
@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_what_a_cell_reads_goes_into_its_gates(kind, gates, dirs):
    assert after(cell(kind, gates, dirs=dirs), merge_products) == ["Transpose", kind]


def test_a_cell_without_biases_gets_them():
    assert after(cell("GRU", 3, biased=False), merge_products) == ["Transpose", "GRU"]


def test_two_transposes_that_have_nothing_between_them_go_too():
    assert after(cell("LSTM", 4, turned=True), merge_products) == ["LSTM"]


def test_a_cell_that_reads_the_last_numbers_elsewhere_stays():
    text = cell("LSTM", 4).replace("perm = [1, 0, 2]", "perm = [1, 2, 0]").replace("batch, time, 8", "8, time, 8")
    model = built(text.replace("float[time, 1, batch, 3]", "float[time, 1, 8, 3]"))
    assert merge_products(model) == 0
