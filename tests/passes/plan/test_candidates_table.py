from __future__ import annotations

from dataclasses import replace

from tests import captured
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.plan.rows import ProbedCandidate


def test_a_chosen_plan_shows_what_was_tried_and_marks_what_was_chosen():
    def probed(path: str, target: str, divergence: float, chosen: bool, added_ms: float | None = None):
        return ProbedCandidate(
            path=path, target=target, divergence=divergence, added_ms=added_ms, params=1, flops=1, chosen=chosen
        )

    plan = replace(
        make_plan(captured.gpt2(), {"*attn": "gru", "*mlp": "keep"}).plan,
        candidates=(
            probed("h.0.attn", "keep", 0.0, False, 0.0),
            probed("h.0.attn", "gru", 0.0312, True, -1.5),
            probed("h.0.mlp", "keep", 0.0, True),
        ),
    )
    lines = str(plan).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("divergence of the guide"))
    assert [line.split() for line in lines[start + 1 : start + 7] if line.strip() and "─" not in line] == [
        ["part", "keep", "gru"],
        ["h.0.attn", "0", "(+0)", "*", "0.031", "(-1.5)"],
        ["h.0.mlp", "*", "0"],
    ]
