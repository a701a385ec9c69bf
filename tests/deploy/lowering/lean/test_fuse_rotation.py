"""Queries and keys that are turned by their place: one node, the same numbers, and what only looks like it stays."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.lowering.lean.test_lean import after, built, inferred, lifted
from thesean.deploy.lowering.lean.fuse_rotation import fuse_rotation
from thesean.deploy.lowering.lean.split_slices import split_slices

ir = pytest.importorskip("onnx_ir")

HALVES = """
    sizes = Constant <value_ints = [4, 4]> ()
    first, second = Split <axis = 3> (h, sizes)
    less = Neg (second)
    turned = Concat <axis = -1> (less, first)"""
COLUMNS = """
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    four = Constant <value_ints = [4]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    first = Slice (h, zero, end, three, two)
    second = Slice (h, one, end, three, two)
    less = Neg (second)
    u = Unsqueeze (less, four)
    v = Unsqueeze (first, four)
    stacked = Concat <axis = -1> (u, v)
    whole = Shape (h)
    turned = Reshape (stacked, whole)"""
GATHERED = """
    places = Constant <value_ints = [{places}]> ()
    turned = Gather <axis = -1> (h, places)"""
OPPOSITE, NEXT = (GATHERED.format(places=p) for p in ("4, 5, 6, 7, 0, 1, 2, 3", "1, 0, 3, 2, 5, 4, 7, 6"))

BOTH = "aa = Concat <axis = -1> (a, a)"
TWICE = """
    last = Constant <value_ints = [3]> ()
    apart = Unsqueeze (a, last)
    pair = Constant <value_ints = [1, 1, 1, 2]> ()
    pairs = Expand (apart, pair)
    flat = Constant <value_ints = [0, 0, 8]> ()
    aa = Reshape (pairs, flat)"""
UNSIGNED = "ss = Sin (aa)"
SIGNED = """
    sign = Constant <value_floats = [{sign}]> ()
    sines = Sin (aa)
    ss = Mul (sign, sines)"""
LATER, EACH = (SIGNED.format(sign=s) for s in ("-1.,-1.,-1.,-1.,1.,1.,1.,1.", "-1.,1.,-1.,1.,-1.,1.,-1.,1."))

FIRST, SECOND = ("batch, 2, time, 8", 1), ("batch, time, 2, 8", 2)


def text(layout: tuple[str, int], turned: str, angles: str = BOTH, sine: str = UNSIGNED, rows: str = "batch") -> str:
    sizes, axis = layout
    return f"""g (float[{sizes}] x, float[{rows}, time, 4] a) => (float[{sizes}] y)
{{
    h = Identity (x)
    {angles}
    cc = Cos (aa)
    {sine}
    axis = Constant <value_ints = [{axis}]> ()
    c = Unsqueeze (cc, axis)
    s = Unsqueeze (ss, axis){turned}
    by_c = Mul (h, c)
    by_s = Mul (turned, s)
    y = Add (by_c, by_s)
}}"""


def changed(given: str, count: int = 1) -> list[str]:
    return after(given, inferred(lifted(fuse_rotation)), count=count)


@pytest.mark.parametrize("rows", ["batch", "1"])
@pytest.mark.parametrize("layout", [FIRST, SECOND], ids=["heads first", "heads after time"])
@pytest.mark.parametrize(
    ("turned", "angles", "sine"),
    [(HALVES, BOTH, UNSIGNED), (OPPOSITE, BOTH, LATER), (COLUMNS, TWICE, UNSIGNED), (NEXT, TWICE, EACH)],
    ids=["halves", "opposite", "columns", "next"],
)
def test_heads_are_turned_by_one_node(layout, turned, angles, sine, rows):
    left = changed(text(layout, turned, angles, sine, rows))
    assert left.count("RotaryEmbedding") == 1
    assert not {"Add", "Neg", "Gather", "Split"} & set(left)
    # places are counted where rows of the batch have their own
    assert ("Range" in left) == (rows == "batch")


def test_a_table_of_weights_is_read_up_to_the_last_step():
    given = text(FIRST, HALVES).replace("float[batch, time, 4] a)", "float[16, 4] A)")
    given = given.replace("aa = Concat <axis = -1> (a, a)", "aa = Concat <axis = -1> (A, A)")
    cut = """
    begin = Constant <value_ints = [0]> ()
    steps = Shape <start = 2, end = 3> (x)
    c = Slice (cc, begin, steps, begin)
    s = Slice (ss, begin, steps, begin)"""
    for line in ("axis = Constant <value_ints = [1]> ()", "c = Unsqueeze (cc, axis)", "s = Unsqueeze (ss, axis)"):
        given = given.replace(f"    {line}\n", "").replace(f"    {line}", "")
    given = given.replace("    sizes =", f"{cut}\n    sizes =").replace(
        "\n{\n", " <float[time, 8] c, float[time, 8] s>\n{\n"
    )
    left = changed(given)
    assert left.count("RotaryEmbedding") == 1
    assert "Range" not in left


def test_heads_cut_from_a_row_are_turned_in_it():
    given = text(SECOND, HALVES).replace(f"float[{SECOND[0]}] x", "float[batch, time, 16] x")
    given = given.replace("h = Identity (x)", "cut = Constant <value_ints = [0, 0, 2, 8]> ()\n    h = Reshape (x, cut)")
    model = built(given)
    inferred(lifted(fuse_rotation))(model)
    (node,) = (n for n in model.graph if n.op_type == "RotaryEmbedding")
    assert node.inputs[0].name == "x"
    assert node.attributes["num_heads"].value == 2
    changed(given)


def test_tables_are_made_once_for_all_that_read_them():
    given = text(FIRST, HALVES).replace("=> (float[batch, 2, time, 8] y)", "=> (float[batch, 2, time, 8] z)")
    again = HALVES.replace("(h, sizes)", "(y, more)").replace("sizes =", "more =")
    for name in ("first", "second", "less", "turned"):
        again = again.replace(name, f"{name}_2")
    again += "\n    c_2 = Mul (y, c)\n    s_2 = Mul (turned_2, s)\n    z = Add (c_2, s_2)\n}"
    left = changed(given[: given.rindex("}")] + again.lstrip("\n"), count=2)
    assert left.count("RotaryEmbedding") == 2
    assert left.count("Range") == 1


def test_features_that_are_cut_off_before_are_not_turned():
    """Of a head of twelve the first eight: torch's exporter cuts them by slices, and these by slices again."""
    given = text(("batch, 2, time, 12", 1), "", BOTH)
    cut = """
    h = Slice (x, b, e, d)
    rest = Slice (x, e, f, d)
    first = Slice (h, b, m, d)
    second = Slice (h, m, e, d)
    less = Neg (second)
    turned = Concat <axis = -1> (less, first)"""
    numbers = {"b": 0, "m": 4, "e": 8, "f": 12, "d": 3}
    constants = "".join(f"\n    {name} = Constant <value_ints = [{n}]> ()" for name, n in numbers.items())
    given = given.replace("h = Identity (x)", "").replace("by_c = Mul", f"{constants}{cut}\n    by_c = Mul")
    given = given.replace("y = Add (by_c, by_s)", "t = Add (by_c, by_s)\n    y = Concat <axis = 3> (t, rest)")

    def both(model: Any) -> int:
        assert inferred(split_slices)(model) == 2
        return inferred(fuse_rotation)(model)

    left = after(given, lifted(both))
    assert left.count("RotaryEmbedding") == 1
    assert left.count("Split") == 1


@pytest.mark.parametrize(
    ("was", "found"),
    [
        ("aa = Concat <axis = -1> (a, a)", "b = Neg (a)\n    bb = Exp (a)\n    aa = Concat <axis = -1> (b, bb)"),
        ("ss = Sin (aa)", LATER),
        ("Concat <axis = -1> (less, first)", "Concat <axis = -1> (first, less)"),
        ("less = Neg (second)\n    turned = Concat <axis = -1> (less, first)",
         "less = Neg (second)\n    turned = Concat <axis = -1> (less, second)"),
        ("by_c = Mul (h, c)", "by_c = Mul (x, c)"),
        ("y = Add (by_c, by_s)", "z = Add (by_c, by_s)\n    y = Add (z, by_s)"),
        ("[4, 4]", "[2, 6]"),
    ],
    ids=[
        "angles differ", "a sign too many", "the other way round", "one half twice", "another's cosine",
        "a reader more", "no halves",
    ],
)  # fmt: skip
def test_what_is_nearly_a_rotation_stays(was: str, found: str):
    given = text(FIRST, HALVES)
    assert was in given
    assert "RotaryEmbedding" not in changed(given.replace(was, found), count=0)


def test_a_table_for_each_head_stays():
    given = text(FIRST, HALVES).replace("float[batch, time, 4] a", "float[batch, 2, time, 4] a")
    given = given.replace("c = Unsqueeze (cc, axis)", "c = Identity (cc)")
    given = given.replace("s = Unsqueeze (ss, axis)", "s = Identity (ss)")
    assert "RotaryEmbedding" not in changed(given, count=0)


def test_half_precision_stays():
    given = text(FIRST, HALVES).replace("float[", "float16[")
    model = built(given)
    assert inferred(lifted(fuse_rotation))(model) == 0
