"""Do an encoder's and a decoder's file together compute what the network does that they were made of?

B batch, T steps of the target, S steps of the source
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from thesean.deploy.parity import Check, with_padding
from thesean.deploy.relative_error import relative_error
from thesean.deploy.session import Session
from thesean.deploy.states import Arrays
from thesean.deploy.streams import Stream
from thesean.passes.analyse.chunks import join
from thesean.passes.graph.halves import Halves
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.signature import Signature

logger = logging.getLogger(__name__)

# Rows, steps of the target and of the source: the one longer than the other, and the other way round
_SIZES = ((2, 6, 9), (3, 11, 5), (1, 4, 19))
_CHUNKS = (1, 3)  # and the rest


@dataclass(frozen=True, kw_only=True)
class Both:
    """Two files that are loaded; `names` of the whole network's outputs."""

    encoder: Session
    decoder: Session
    halves: Halves
    names: Sequence[str]

    @torch.no_grad()
    def compare(self, module: fx.GraphModule, signature: Signature) -> tuple[list[Check], list[str]]:
        """With the whole network in torch, padding in its masks: at once and in chunks. And a note for each size at
        which it doesn't run itself.
        """
        checks, skipped = [], []
        for rows, steps, length in _SIZES:
            wanted = {
                s: rows if s.startswith("batch") else steps if s == self.halves.length else length
                for s in signature.symbols
            }
            sizes = signature.within(wanted)
            inputs, shown_BT = with_padding(signature, signature.random_inputs(sizes, seed=2))
            shape = (rows, steps, length)
            try:
                want = [v.numpy() for v in leaf_values(module(**inputs))]
            except (RuntimeError, IndexError) as error:
                logger.debug("the module does not run at %s: %s", shape, error)
                skipped.append(f"both files not checked at {shape}: the torch module doesn't run there either")
                continue
            steps = sizes[self.halves.length]
            for label, chunks in (("both files vs torch", (steps,)), ("both files in chunks vs torch", _cut(steps))):
                found = self._run({n: v.numpy() for n, v in inputs.items()}, chunks, want)
                errors = []
                for got, wanted_array in zip(found, want, strict=True):
                    kept = shown_BT if shown_BT is not None and wanted_array.shape[:2] == shown_BT.shape else ...
                    same = got.shape == wanted_array.shape
                    errors.append(relative_error(got[kept], wanted_array[kept]) if same else float("inf"))
                checks.append(Check.of(label, shape, self.names, errors))
        return checks, skipped

    def _run(self, inputs: Arrays, chunks: Sequence[int], like: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The network's outputs, in order."""
        of_source, _ = self.encoder.run({spec.name: inputs[spec.name] for spec in self.halves.encoder.inputs})
        encoded = {name: of_source[name] for name in self.halves.crossing}
        stream, parts = Stream(self.decoder), []
        ends = np.cumsum(chunks).tolist()
        for end, size in zip(ends, chunks, strict=True):
            piece: Arrays = dict(encoded)
            for spec in self.halves.decoder.inputs:
                if not spec.held:
                    cut = tuple(slice(end - size, end) if d == "time" else slice(None) for d in spec.shape)
                    piece[spec.name] = inputs[spec.name][cut]
            parts.append(stream(piece))
        if late := stream.end():
            parts.append(late)
        encoder_names, decoder_names = list(self.encoder.outputs), list(self.decoder.outputs)
        found = []
        for (is_source, at), whole in zip(self.halves.leaves, like, strict=True):
            if is_source:
                found.append(of_source[encoder_names[at]])
                continue
            pieces = [torch.from_numpy(part[decoder_names[at]]) for part in parts]
            joined = join(pieces, torch.Size(whole.shape))
            found.append(pieces[-1].numpy() if isinstance(joined, str) else joined.numpy())
        return found


def _cut(length: int) -> tuple[int, ...]:
    """1, 3 and the rest, as far as the length goes."""
    chunks: list[int] = []
    for size in (*_CHUNKS, length):
        if sum(chunks) < length:
            chunks.append(min(size, length - sum(chunks)))
    return tuple(chunks)
