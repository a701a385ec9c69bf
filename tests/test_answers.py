"""Two files that answer the same prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import thesean
from tests import models
from thesean.answers import compare_answers
from thesean.deploy.session import Session
from thesean.errors import DataError
from thesean.report.answers import Answer, Answers

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Session, Session]:
    folder: Path = tmp_path_factory.mktemp("answers")
    data, guide = models.token_batches(), models.spread(models.gpt2())
    converted = thesean.compile(guide, "rnn", data=data, recipe="fast", progress=False)
    thesean.export_guide(guide, folder / "guide.onnx", data=data, stateful="yes")
    converted.export(folder / "converted.onnx", stateful="yes")
    return Session(folder / "guide.onnx"), Session(folder / "converted.onnx")


def test_a_file_agrees_with_itself(files):
    found = compare_answers(files[0], files[0], PROMPTS, 6)
    assert (found.agreement, found.same, found.parts_at) == (1.0, 3, None)
    assert str(found).endswith("the next token is the guide's in 100.0%. 3 answers are the same.")


def test_answers_are_what_each_writes_alone_and_agreement_is_after_the_guides_text(files):
    guide, converted = files
    found = compare_answers(guide, converted, PROMPTS, 6, decode=lambda tokens: " ".join(map(str, tokens)))
    for prompt, answer in zip(PROMPTS, found.answers, strict=True):
        assert list(answer.guide) == guide.generate(prompt, 6)
        assert list(answer.converted) == converted.generate(prompt, 6)
        for k, agrees in enumerate(answer.agrees):
            assert agrees == (converted.generate([*prompt, *answer.guide[:k]], 1) == [answer.guide[k]])
    assert 0 < found.agreement < 1, "else the test says nothing"
    told = json.loads(found.to_json())
    assert told["answers"][0]["guide_text"] == " ".join(map(str, found.answers[0].guide))
    assert str(found).count("\n  converted ") == 3 - found.same


def test_where_answers_part():
    def answer(guide: tuple[int, ...], converted: tuple[int, ...]) -> Answer:
        return Answer(prompt=(1,), guide=guide, converted=converted, agrees=tuple(True for _ in guide))

    assert answer((1, 2, 3), (1, 2, 3)).parts_at is None
    assert answer((1, 2, 3), (1, 5, 3)).parts_at == 1
    assert answer((1, 2), (1, 2, 3)).parts_at == 2  # one of them stopped
    found = Answers(answers=(answer((1, 2), (1, 2)), answer((1, 2), (0, 2)), answer((1, 2), (1, 0))))
    assert (found.same, found.parts_at) == (1, 0.5)


def test_a_page_marks_where_answers_part(tmp_path):
    said = (
        Answer(prompt=(1,), guide=(2, 3), converted=(2, 3), agrees=(True, True)),
        Answer(prompt=(1,), guide=(2, 3), converted=(2, 4), agrees=(True, False)),
        Answer(prompt=(1,), guide=(2, 3), converted=(2,), agrees=(True, True)),
    )
    found = Answers(answers=said, decode=lambda tokens: "".join(f"<{token}>" for token in tokens))
    converted = thesean.compile(models.mlp(), "mlp", data=models.labelled(4, 4, 8), recipe="fast", progress=False)
    page = converted.report.html(tmp_path / "page.html", answers=found).read_text(encoding="utf-8")
    section = page.split("As it answers")[1].split("</section>")[0]
    assert section.count(">part at token 1<") == 2
    assert "<b>converted</b> &lt;2&gt; <mark>&lt;4&gt;</mark>" in section
    assert "<b>converted</b> &lt;2&gt; <mark>(ends)</mark>" in section
    assert section.index(">part at token 1<") < section.index("the same to the end")
    assert "As it answers" not in converted.report.html(tmp_path / "other.html").read_text(encoding="utf-8")


def test_what_can_not_be_asked_is_refused(files):
    with pytest.raises(DataError, match="prompts is empty"):
        compare_answers(files[0], files[1], [])
    with pytest.raises(DataError, match="the prompt is empty"):
        compare_answers(files[0], files[1], [[1], []])
    with pytest.raises(DataError, match="max_new_tokens: expected at least 1, found 0"):
        compare_answers(files[0], files[1], PROMPTS, 0)
