"""Resemblyzer's speaker encoder, three LSTM layers over frames of a mel spectrogram.

    pip install --no-deps resemblyzer

No speech: frames that change slowly, and are as loud as those of speech. What is learned of the network from them holds
for such frames.

B batch, T time, D width
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.suite import BenchmarkError
from benchmarks.trained.subject import Subject, cosine

BATCH, FRAMES, BANDS = 16, 160, 40


class SpeakerEncoder(nn.Module):
    """mel_BTD -> unit vectors (Wan et al. 2018); the names are the checkpoint's."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        hidden_BTD, _ = self.lstm(mel)
        return F.normalize(self.linear(hidden_BTD[:, -1]).relu(), dim=-1)


def subject(settings: dict[str, Any]) -> Subject:
    count = settings["batches"]
    return Subject(
        name="Resemblyzer",
        guide=pretrained(),
        data=[frames(k) for k in range(count)],
        chosen_by=[frames(count + k) for k in range(2)],
        judged={"frames not seen": [frames(1000 + k) for k in range(settings["judged"])]},
        targets={
            "upper two layers: mingru": {"lstm.l1": "mingru", "lstm.l2": "mingru"},
            "upper two layers: gru": {"lstm.l1": "gru", "lstm.l2": "gru"},
        },
        compare=cosine,
        lengths=(FRAMES,),
    )


def pretrained() -> SpeakerEncoder:
    spec = find_spec("resemblyzer")
    if spec is None or spec.origin is None:
        raise BenchmarkError("resemblyzer is not installed: see the head of benchmarks/trained/voices.py.")
    guide = SpeakerEncoder()
    saved = torch.load(Path(spec.origin).parent / "pretrained.pt", map_location="cpu", weights_only=True)
    guide.load_state_dict(saved["model_state"], strict=False)
    return guide.eval()


def frames(seed: int, count: int = FRAMES) -> torch.Tensor:
    """A batch of sequences of so many frames."""
    steps = torch.randn(BATCH, count, BANDS, generator=torch.Generator().manual_seed(seed))
    return (0.3 * steps.cumsum(1)).sigmoid().square() * 0.2
