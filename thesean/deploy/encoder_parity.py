"""Do an encoder's and a decoder's file together compute what the network does that they were made of?

B batch, T steps of the target, S steps of the source
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from thesean.deploy.parity import Check, outputs_of, with_padding
from thesean.deploy.relative_error import relative_error
from thesean.deploy.session import Session
from thesean.deploy.streams import Stream
from thesean.passes.analyse.chunks import cut, join, split_inputs
from thesean.passes.graph.halves import Halves
from thesean.passes.graph.signature import Signature

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
            expected = outputs_of(module, inputs, shape)
            if expected is None:
                skipped.append(f"both files not checked at {shape}: the torch module doesn't run there either")
                continue
            want, steps = [v.numpy() for v in expected], sizes[self.halves.length]
            ways = (("both files vs torch", (steps,)), ("both files in chunks vs torch", cut(steps, _CHUNKS)))
            for label, chunks in ways:
                found = self._run(inputs, chunks, want)
                errors = []
                for got, wanted_array in zip(found, want, strict=True):
                    kept = shown_BT if shown_BT is not None and wanted_array.shape[:2] == shown_BT.shape else ...
                    same = got.shape == wanted_array.shape
                    errors.append(relative_error(got[kept], wanted_array[kept]) if same else float("inf"))
                checks.append(Check.of(label, shape, self.names, errors))
        return checks, skipped

    def _run(
        self, inputs: dict[str, torch.Tensor], chunks: Sequence[int], like: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """The network's outputs, in order."""
        of_source, _ = self.encoder.run({spec.name: inputs[spec.name].numpy() for spec in self.halves.encoder.inputs})
        encoded = {name: torch.from_numpy(of_source[name]) for name in self.halves.crossing}
        stream, parts = Stream(self.decoder), []
        for piece in split_inputs(self.halves.decoder, {**inputs, **encoded}, chunks):
            parts.append(stream({name: value.numpy() for name, value in piece.items()}))
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
