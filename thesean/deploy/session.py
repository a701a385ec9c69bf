"""An ONNX file that serves: chunks with the state kept, text from tokens, streams that come and go.

B batch, T time, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Unpack, overload

import numpy as np

from thesean.deploy.loaded import Loaded
from thesean.deploy.onnx_file import BESIDE_ENCODER
from thesean.deploy.sampling import SamplingOptions, is_whole
from thesean.deploy.states import Arrays, State
from thesean.deploy.streams import Stream, Streams, checked_source, prompts_of, stops_of
from thesean.deploy.told import Beside, told_as
from thesean.errors import DataError, ExportError
from thesean.scratch import file_sha256


class Session(Loaded):
    """A file in onnxruntime on CPU: `run` for arrays, `stream` for chunks, `generate` for text, `streams` for a server,
    `save_state` and `load_state` for what goes on later. Of an encoder-decoder it is the decoder's, and `encode` runs
    the encoder's beside it. Raises what `Loaded` raises.
    """

    @cached_property
    def encoder(self) -> Session:
        """The encoder's file, of a decoder's. Raises DataError where there is none, ExportError where it is missing or
        of another conversion.
        """
        told = told_as(self.metadata, BESIDE_ENCODER, Beside, Beside(file=""))
        if not told.file:
            raise DataError(f"{self.path}: expected a decoder's file, found one that reads everything itself.")
        beside = self.path.with_name(Path(told.file).name)
        if not beside.is_file():
            raise ExportError(f"{self.path}: its encoder, {beside.name}, is not beside it. Move both files together.")
        if file_sha256(beside) != told.sha256:
            raise ExportError(f"{self.path}: {beside.name} is of another conversion. Export both again.")
        return Session(beside, self.threads)

    def encode(self, inputs: Arrays) -> Arrays:
        """What the decoder reads of its source, from the encoder's inputs: keys and values, computed once, and masks.
        They are inputs of every `run`, beside the tokens, and what `generate` takes as `encoded`; the encoder's other
        outputs are those of `encoder.run`. Raises what `encoder` raises, and DataError.
        """
        return self._crossing(self.encoder.run(inputs)[0])

    def run_whole(self, inputs: Arrays) -> tuple[Arrays, State]:
        """`run` from a sequence's start, of all that the network took before it was divided: an encoder runs too, and
        its other outputs are among those. Raises what `encode` and `run` raise.
        """
        found = self._of_source(inputs)
        outputs, state = self.run({**self._of_target(inputs), **self._crossing(found)})
        return {**{n: v for n, v in found.items() if n not in self.held}, **outputs}, state

    def step_after(self, inputs: Arrays, one: Arrays) -> Arrays:
        """What `run` takes of a step, the network's inputs `one`, after all of its `inputs`: the same source beside."""
        return {**self._of_target(one), **self._crossing(self._of_source(inputs))}

    def _of_source(self, inputs: Arrays) -> Arrays:
        if not self.held:
            return {}
        return self.encoder.run({n: v for n, v in inputs.items() if n in self.encoder.inputs})[0]

    def _crossing(self, outputs: Arrays) -> Arrays:
        """Of an encoder's."""
        return {name: outputs[name] for name in self.held}

    def _of_target(self, inputs: Arrays) -> Arrays:
        return {n: v for n, v in inputs.items() if not self.held or n not in self.encoder.inputs or n in self.inputs}

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
        encoded: Mapping[str, np.ndarray] | None = None,
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
        encoded: Mapping[str, np.ndarray] | None = None,
        seed: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[list[int]]: ...

    def generate(
        self,
        prompts: Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_ids: Sequence[int] = (),
        encoded: Mapping[str, np.ndarray] | None = None,
        seed: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[int] | list[list[int]]:
        """New tokens of a prompt, or of each of several of any lengths: the prompts are read once, then one token at a
        time with the state carried. A file without state reads everything again for each token.

        Greedy, unless `temperature` and what else `thesean.deploy.sampling.Sampling` takes say otherwise. A row ends
        with the first of `stop_ids`, or with as many tokens. Each row draws for itself: the same `seed` gives the same
        text, and none another one each time. `encoded`: of a decoder's file, what `encode` made of the sources, a row a
        prompt. The first integer input takes the tokens, every other input is a mask that shows them all; the first
        output is taken as logits_BTV. Raises DataError for an empty prompt, ids that the file has no row of, settings
        that don't fit, or a file that writes no text; UnknownNameError for a setting that there is not.
        """
        for name, number in (("max_new_tokens", max_new_tokens), ("seed", 0 if seed is None else seed)):
            if not is_whole(number) or number < 0:
                raise DataError(f"{name}: expected a whole number of at least 0, found {number!r}.")
        rows, single = prompts_of(prompts)
        streams, stops = self.streams(), stops_of(stop_ids)
        sources = checked_source(self, encoded, len(rows))
        made: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            own = None if seed is None else (seed, index)
            source = {name: value[index : index + 1] for name, value in sources.items()} or None
            made[streams.join(row, seed=own, encoded=source, **sampling)] = []
        while len(streams) and max_new_tokens > 0:
            for stream, token in streams.step().items():
                made[stream].append(token)
                if token in stops or len(made[stream]) == max_new_tokens:
                    streams.leave(stream)
        found = list(made.values())
        return found[0] if single else found
