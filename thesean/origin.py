"""What a file can tell of the guide that it comes from."""

from __future__ import annotations

from dataclasses import replace

from thesean.distill.stream import hash_of
from thesean.passes.capture.captured import Captured


def with_origin(captured: Captured) -> Captured:
    """The guide with the hash of its weights in the signature, which goes with whatever is made of it. Half a second a
    gigabyte.
    """
    signature = captured.signature
    weights = hash_of(captured.graph_module.state_dict().values())
    return replace(captured, signature=replace(signature, origin=replace(signature.origin, weights=weights)))
