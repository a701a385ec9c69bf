"""Whether a network is a causal language model, and which of its inputs and outputs are what.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from thesean.deploy.genai.folder import Served
from thesean.deploy.lowering.to_onnx import output_names
from thesean.deploy.parity import CheckSizes
from thesean.errors import ArtifactError, ExportError
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.signature import Signature

POSITIONS = "position_ids"

# Of the logits' scale: rounding moves earlier steps by 1e-6, one that sees the last token by 1e-3 and more.
_MOVED = 1e-4


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Names of inputs and of the output; `words` is the size of the vocabulary."""

    tokens: str
    mask: str | None
    positions: str | None
    logits: str
    words: int

    def to_json(self) -> dict[str, str | None]:
        return {k: v for k, v in asdict(self).items() if k != "words"}

    @staticmethod
    def read(told: Mapping[str, Any], words: Any, signature: Signature, network: fx.GraphModule) -> Roles:
        """As config.json has them. Raises ArtifactError for names that the network doesn't have."""
        if not isinstance(told, Mapping) or not isinstance(words, int):
            raise ArtifactError(f"config.json: expected roles by name and a vocab_size, found {told!r}, {words!r}.")
        inputs = {s.name for s in signature.inputs}
        named = {key: told.get(key) for key in ("tokens", "mask", "positions")}
        wrong = [n for n in named.values() if n is not None and not (isinstance(n, str) and n in inputs)]
        given = [n for n in named.values() if n is not None]
        if (
            wrong
            or len(set(given)) < len(given)
            or named["tokens"] is None
            or told.get("logits") not in list(output_names(network))
        ):
            raise ArtifactError(f"config.json: roles: expected names of inputs and of an output, found {dict(told)}.")
        return Roles(
            tokens=str(named["tokens"]),
            mask=named["mask"],
            positions=named["positions"],
            logits=told["logits"],
            words=words,
        )


def roles_of(network: fx.GraphModule, signature: Signature) -> Roles | None:
    """None for anything but ids_BT, and maybe a mask and positions, to logits_BTV of which none sees a later token."""
    with evaluating(network):
        try:
            served = Served.of(network, signature)
        except ExportError:
            return None
        name, names = served.tokens.name, output_names(network)
        sizes = CheckSizes(batch=2, length=5).within(signature).of(signature)
        device = next((str(p.device) for p in network.parameters()), "cpu")
        inputs = signature.random_inputs(sizes, device=device)
        moved = dict(inputs)
        moved[name] = inputs[name].clone()
        moved[name][:, -1] = (moved[name][:, -1] + 1) % (served.tokens.high or 2)
        with torch.no_grad():
            before, after = (leaf_values(network(**x))[names.index(served.logits)].float() for x in (inputs, moved))
    if (before - after)[:, :-1].abs().max() > _MOVED * max(1.0, float(before.abs().max())):
        return None
    return Roles(
        tokens=name,
        mask=None if served.mask is None else served.mask.name,
        positions=POSITIONS if any(s.name == POSITIONS for s in signature.inputs) else None,
        logits=served.logits,
        words=served.words,
    )
