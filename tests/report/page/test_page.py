"""A conversion as a page: whole by itself, well formed, and honest about what it doesn't know."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import thesean
from tests import captured
from tests.hf.converted import bounded, padded
from tests.report.points import FOUND
from thesean.curve import Curve
from thesean.errors import DataError, WriteError
from thesean.passes.plan.rows import PlannedPart, ProbedCandidate
from thesean.report.conversion import ConversionReport, StageRow
from thesean.report.page.findings import Alike, Findings, Lost, Served
from thesean.report.page.page import page
from thesean.report.page.picture import plan_picture
from thesean.report.page.serve import program
from thesean.report.page.style import STYLE
from thesean.write_page import _served

SAVED = Path(__file__).parents[2] / "formats" / "v1" / "conversions" / "gru"
EVIL = "blocks.0[<b>\"&'</script>"
PLAN = thesean.Plan(
    parts=(
        PlannedPart(path=EVIL, target="gru", params=10, new_params=20),
        PlannedPart(path="blocks.1", target="keep", params=5),
    ),
    flops=40,
    candidates=(
        ProbedCandidate(path=EVIL, target="gru", divergence=0.5, added_ms=-0.25, params=9, flops=8, chosen=True),
        ProbedCandidate(path=EVIL, target="rnn", divergence=0.25, added_ms=0.5, params=9, flops=8, chosen=False),
    ),
)
STAGE = StageRow(
    part=EVIL, replaced=1, of=1, measure="nmse", before=0.5, after=0.25, loss=1.5, metric=0.5, divergence=0.125,
    steps=3, seconds=1.0, stopped_by="plateau", params=25, flops=20,
)  # fmt: skip
REPORT = ConversionReport(
    guide={"loss": 1.0, "metric": 0.75, "divergence": 0.0},
    converted={"loss": 1.25, "metric": 0.5, "divergence": 0.125},
    stages=(STAGE, STAGE),
    steps=3,
    seconds=61.2,
    params=25,
    flops=20,
    train_length=None,
    recipe={"name": "fast", "closed_form": {"enabled": True}},
    seed=7,
    notes=("a <i>note</i>",),
    copied={EVIL: ["query"]},
    curves=(
        Curve(
            phase="align", part=EVIL, learning_rate=1e-3, steps=3, every=1, losses=(1.0, 2.0, float("nan")),
            held_out=((0, 0.5), (3, 0.25)), kept=3,
        ),
    ),
)  # fmt: skip
FINDINGS = Findings(
    why={},
    served=Served(
        file="a'b.onnx",
        inputs=(("ids", "int64", ("batch", "time")),),
        states=(("state_in_0", "float32", ("batch", 4)), ("past", "float32", ("batch", "past", 2))),
        outputs=("logits",),
    ),
    lost=(
        Lost(number=3, distance=1.5, shown="<script>alert(1)</script>\x00", guide="'<'", converted="b"),
        Lost(number=4, distance=1.0, shown=[[0.0, 1.0], [0.5, 0.5]], guide="class 1", converted="class 2"),
    ),
    unit="nats",
    looked_at=9,
    alike=Alike(parts=(EVIL,), matrix=((float("nan"),),), rows=8),
)
VOID = {"meta", "br", "img", "link"}


class Reader(HTMLParser):
    """Elements in order with their parents; raises AssertionError for one that isn't closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        self.found.append((tag, dict(attrs), self.open[-1] if self.open else ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def tags(self, *names):
        return [(attrs, parent) for tag, attrs, parent in self.found if tag in names]


@pytest.fixture(scope="module")
def made() -> str:
    return page(PLAN, REPORT, FINDINGS, {"python": "3.11", "commit": None})


@pytest.fixture(scope="module")
def converted() -> thesean.Converted:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), *(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2)), nn.Linear(64, 3)
    )
    data = [(torch.randn(16, 1, 8, 8), torch.randint(3, (16,))) for _ in range(3)]
    return thesean.compile(
        model, "mlp", data=data, eval_data=data, parts=["1", "2"], recipe="fast", progress=False,
        loss=thesean.cross_entropy,
    )  # fmt: skip


def test_it_needs_nothing_from_elsewhere_and_runs_nothing(made):
    reader = Reader(made)
    assert not reader.tags("script", "link", "img", "iframe", "object", "base", "form", "a")
    for _, attrs, _ in reader.found:
        assert not {"src", "href", "xlink:href", "srcset", "action"} & attrs.keys()
        assert not any(name.startswith("on") for name in attrs)
    without = made.replace("http-equiv", "")
    assert not [word for word in ("url(", "@import", "http") if word in without]


def test_what_no_stage_was_judged_by_is_not_drawn():
    stages = (replace(STAGE, metric=None),) * 2
    heard = Reader(page(PLAN, replace(REPORT, stages=stages), FINDINGS, {})).words
    assert "Loss" in heard
    assert "Metric" not in heard


def test_headings_descend_and_no_two_ids_are_alike(made):
    reader = Reader(made)
    levels = [int(tag[1]) for tag, _, _ in reader.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    ids = [attrs["id"] for _, attrs, _ in reader.found if "id" in attrs]
    assert len(ids) == len(set(ids)) > 10
    labels = [a["aria-labelledby"] for _, a, _ in reader.found if "aria-labelledby" in a]
    assert {name for label in labels for name in label.split()} <= set(ids)


def parts(*targets: str) -> thesean.Plan:
    some = [PlannedPart(path=f"h.{i}", target=t, params=10, new_params=20) for i, t in enumerate(targets)]
    return thesean.Plan(parts=tuple(some), flops=40)


def stops(plan: thesean.Plan) -> list[str]:
    found = re.findall(r'class="path">(.*?)</.*?class="became">(.*?)<', plan_picture(plan, REPORT))
    return [f"{path} {became}" for path, became in found]


def test_a_row_of_parts_of_which_the_same_is_told_is_one_stop_of_the_picture():
    assert stops(parts("gru", "gru", "gru", "keep", "rnn", "rnn", "gru", "gru", "gru")) == [
        "h.0 to h.2 3 parts, each became gru",
        "h.3 kept",
        "h.4 became rnn",  # two are told by themselves
        "h.5 became rnn",
        "h.6 to h.8 3 parts, each became gru",
    ]
    report = replace(REPORT, copied={"h.1": ["query"]})
    told = plan_picture(parts("gru", "gru", "gru"), report)
    assert told.count('class="path"') == 3  # they don't all come from the same


def test_parts_that_come_in_turns_are_told_once_a_turn():
    assert stops(parts(*["gru", "keep"] * 3, "rnn")) == [
        "h.0 to h.4, 1 of every 2 3 parts, each became gru",
        "h.1 to h.5, 1 of every 2 3 parts, each kept",
        "h.6 became rnn",
    ]
    assert stops(parts("keep", *["gru", "gru", "gru", "rnn", "keep"] * 4, "gru")) == [
        "h.0 to h.15, 1 of every 5 4 parts, each kept",
        "h.1 to h.18, 3 of every 5 12 parts, each became gru",
        "h.4 to h.19, 1 of every 5 4 parts, each became rnn",
        "h.20 kept",
        "h.21 became gru",
    ]
    assert len(stops(parts(*["gru", "keep"] * 2))) == 4  # two turns are read faster than told
    assert len(stops(parts(*["gru"] * 8 + ["keep"] + ["gru"] * 8 + ["keep"] + ["gru"] * 8))) == 5


def test_pictures_are_named_and_tables_have_captions_and_scopes(made):
    reader = Reader(made)
    pictures = reader.tags("svg")
    assert len(pictures) >= 7
    assert all(a["role"] == "img" and (a.get("aria-label") or a.get("aria-labelledby")) for a, _ in pictures)
    assert len(reader.tags("caption")) == len(reader.tags("table")) >= 6
    assert all(attrs["scope"] in ("row", "col") for attrs, _ in reader.tags("th"))
    assert reader.found[0][1]["lang"] == "en"


def test_what_comes_from_outside_is_shown_as_it_is(made):
    told = "".join(Reader(made).words)
    for words in (EVIL, "a <i>note</i>", "<script>alert(1)</script>\ufffd", "'<'"):
        assert words in told
    assert "nan" not in made.replace("Debiased CKA", "").split("</style>")[1].lower()


def test_it_tells_where_weights_came_from(made):
    told = "".join(Reader(made).words)
    for words in ("copied query", "solved last linear map", "trained at its exit", "became gru", "1 of 2 parts"):
        assert words in told
    assert "-0.25 ms" in told
    assert "trained with the whole" not in told  # nothing was tuned


def test_the_lines_that_serve_a_file_are_python_with_its_own_names(made):
    lines = next(w for w in Reader(made).words if w.startswith("import numpy"))
    compile(lines, "page", "exec")
    for line in ('InferenceSession("a\'b.onnx")', "'past': np.zeros((1, 0, 2), np.float32)", "found[:1], found[1:]"):
        assert line in lines


def test_a_mask_is_served_as_one_that_hides_nothing():
    """A user runs these lines as they are: with zeros an encoder would see no token."""
    lines = program(_served(captured.bert().signature, None)).splitlines()
    assert "    'input_ids': np.zeros((1, 16), np.int64)," in lines
    assert "    'attention_mask': np.ones((1, 16), np.int64)," in lines


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_stand_out_from_their_ground(theme):
    light, dark = re.findall(r":root\{[^}]*?(--ground[^}]*)\}", STYLE)
    colours = dict(re.findall(r"--(\w+):(#\w+)", light if theme == "light" else dark))
    for ground in ("ground", "raised"):
        for ink in ("ink", "muted", "accent"):
            assert contrast(rgb(colours[ink]), rgb(colours[ground])) >= 4.5
    # a heatmap's darkest cell, as charts.py mixes it
    cell = [0.62 * c + 0.38 * g for c, g in zip(rgb(colours["cell"]), rgb(colours["ground"]), strict=True)]
    assert contrast(rgb(colours["ink"]), cell) >= 4.5


def rgb(text):
    text = text[1:] if len(text) == 7 else "".join(c * 2 for c in text[1:])
    return [int(text[i : i + 2], 16) for i in (0, 2, 4)]


def contrast(one, other):
    """WCAG 2.2's ratio."""

    def light(colour):
        r, g, b = (c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_conversion_is_compared_with_its_guide_on_the_data_given(converted, tmp_path):
    data = [(torch.randn(16, 1, 8, 8), torch.randint(3, (16,)))]
    found = converted.report.html(tmp_path / "report.html", data=data)
    told = "".join(Reader(found.read_text()).words)
    for words in ("Of 16 examples", "class ", "nats", "Debiased CKA at the parts' exits, over 16 rows"):
        assert words in told
    pixels = [a for a, parent in Reader(found.read_text()).tags("rect") if parent == "svg" and "fill" in a]
    assert len(pixels) > 100


@pytest.mark.parametrize("right", [False, True])
def test_padding_is_neither_shown_nor_compared(right, tmp_path, monkeypatch):
    monkeypatch.setattr("thesean.write_page.environment", dict)  # has the time in it
    converted, batch = bounded(), padded(5, 9, 7)
    if right:
        batch = {name: value.flip(1) for name, value in batch.items()}
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 1, batch["input_ids"])}
    pages = []
    for one in (batch, other):
        path = converted.report.html(tmp_path / "report.html", data=[one], decode=lambda tokens: str(tokens))
        pages.append(Reader(path.read_text()).words)
    assert pages[0] == pages[1]
    assert "over 21 rows" in "".join(pages[0])


def test_a_loaded_one_says_what_it_cannot_tell(tmp_path):
    loaded = thesean.load(SAVED)
    told = loaded.report.html(tmp_path / "report.html", data=[torch.randn(2, 6, 8)]).read_text()
    assert told.count("a saved conversion doesn&#x27;t hold it") == 2
    told = loaded.report.html(tmp_path / "report.html").read_text()
    assert told.count("No data was given") == 2


def test_where_latencies_were_measured_quality_stands_against_them(made):
    assert "cost is told in FLOPs" in made
    measured = page(PLAN, REPORT, replace(FINDINGS, trade_offs=FOUND), {"python": "3.11"})
    reader = Reader(measured)
    told = "".join(reader.words)
    for words in ("loss: a token after 64, batch 1", "1 of 2", "1 ms*", "a <b>note</b>", "judged on 4 rows"):
        assert words in told
    assert "FLOPs of a forward" not in told
    rings = [a for a, _ in reader.tags("circle") if "marked" in a["class"] and "main" in a["class"]]
    assert len(rings) >= 2  # the conversion, where it is on the front
    assert len(reader.tags("svg")) == len(Reader(made).tags("svg")) + 3


def test_trade_offs_of_another_network_are_refused(tmp_path):
    loaded = thesean.load(SAVED)
    path = FOUND.to_json(tmp_path / "found.json")
    with pytest.raises(DataError, match="none of its networks has this one's"):
        loaded.report.html(tmp_path / "report.html", trade_offs=path)
    points = tuple(replace(p, params=loaded.report.params) for p in FOUND)
    found = loaded.report.html(tmp_path / "report.html", trade_offs=replace(FOUND, points=points))
    assert "on the Pareto front" in found.read_text()


def test_what_fails_leaves_the_earlier_page(converted, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("earlier")
    with pytest.raises(DataError):
        converted.report.html(path, data=[torch.randn(2, 1, 3, 3)])
    with pytest.raises(thesean.TheseanError):
        converted.report.html(path, onnx=tmp_path / "none.onnx")
    texts = nn.Sequential(nn.Embedding(5, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 5))
    data = [torch.randint(5, (4, 6)) for _ in range(2)]
    read = thesean.compile(texts, "mlp", data=data, parts=["1"], recipe="fast", progress=False)
    with pytest.raises(DataError, match=r"decode\(tokens\) raised KeyError"):
        read.report.html(path, data=data, decode=lambda tokens: {}[tokens[0]])
    assert path.read_text() == "earlier"
    read.report.html(path, data=data, decode=lambda tokens: "<" + "abcde"[tokens[-1]] + ">")
    assert re.search(r"&lt;[a-e]&gt;", path.read_text())
    with pytest.raises(WriteError):
        converted.report.html(tmp_path / "none" / "report.html")
    with pytest.raises(DataError, match=r"answers: expected what thesean\.compare_answers gave, found \['a'\]"):
        converted.report.html(path, answers=["a"])
    with pytest.raises(DataError, match="decode: expected a function of tokens that gives text, found 3"):
        converted.report.html(path, decode=3)


def test_a_report_by_itself_has_no_network_to_show(converted):
    assert ConversionReport.from_dict(converted.report.to_dict()) == converted.report
    for alone in (copy.deepcopy(converted.report), pickle.loads(pickle.dumps(converted.report))):
        assert alone == converted.report
        with pytest.raises(DataError, match="stands alone"):
            alone.html("report.html")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_nothing_sticks_out_of_a_phone(made, tmp_path):
    script = "<script>document.title = document.querySelector('main').scrollWidth</script>"
    policy = re.compile(r"<meta http-equiv[^>]*>")
    narrow = policy.sub("<style>body{width:400px}</style>", made).replace("</body>", f"{script}</body>")
    (tmp_path / "page.html").write_text(narrow)
    words = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*words, "--dump-dom", f"file://{tmp_path / 'page.html'}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "<title>400</title>" in done.stdout
