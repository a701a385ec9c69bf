"""An ONNX file that serves: chunks with the state kept, text from tokens, streams that come and go.

B batch, T time, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack, overload

import numpy as np

from thesean.deploy.loaded import Loaded
from thesean.deploy.sampling import SamplingOptions
from thesean.deploy.streams import Stream, Streams
from thesean.errors import DataError


class Session(Loaded):
    """A file in onnxruntime on CPU: `run` for arrays, `stream` for chunks, `generate` for text, `streams` for a server,
    `save_state` and `load_state` for what goes on later. Raises what `Loaded` raises.
    """

    def stream(self, state: Mapping[str, np.ndarray] | None = None) -> Stream:
        """A batch of sequences in chunks, the state kept between."""
        return Stream(self, state)

    def streams(self) -> Streams:
        """Streams of tokens that come and go, packed in one batch. Raises DataError for a file that writes no text."""
        return Streams(self)

    @overload
    def generate(
        self,
        prompts: Sequence[int],
        max_new_tokens: int,
        *,
        stop_ids: Sequence[int] = (),
        seed: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[int]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_ids: Sequence[int] = (),
        seed: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[list[int]]: ...

    def generate(
        self,
        prompts: Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_ids: Sequence[int] = (),
        seed: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[int] | list[list[int]]:
        """New tokens of a prompt, or of each of several of any lengths: the prompts are read once, then one token at a
        time with the state carried. A file without state reads everything again for each token.

        Greedy, unless `temperature` and what else `thesean.deploy.sampling.Sampling` takes say otherwise. A row ends
        with the first of `stop_ids`, or with as many tokens. Each row draws for itself: the same `seed` gives the same
        text, and none another one each time. The first integer input takes the tokens, every other input is a mask that
        shows them all; the first output is taken as logits_BTV. Raises DataError for an empty prompt, settings that
        don't fit, or a file that writes no text.
        """
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise DataError(f"max_new_tokens: expected a whole number of at least 0, found {max_new_tokens!r}.")
        single = not len(prompts) or not np.ndim(prompts[0])
        rows: Sequence[Any] = [prompts] if single else prompts
        streams, stops = self.streams(), frozenset(stop_ids)
        made: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            own = None if seed is None else (seed, index)
            made[streams.join(row, seed=own, **sampling)] = []
        while len(streams) and max_new_tokens > 0:
            for stream, token in streams.step().items():
                made[stream].append(token)
                if token in stops or len(made[stream]) == max_new_tokens:
                    streams.leave(stream)
        found = list(made.values())
        return found[0] if single else found
