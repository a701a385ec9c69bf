"""Which inputs a network reads as a whole and which step by step, where all of them are as long.

B batch, T time
"""

from __future__ import annotations

import torch
from torch import fx

from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.resample import is_mask
from thesean.passes.graph.signature import InputSpec, Signature

_BATCH, _TIME = 2, 7

# Of the output's largest change: rounding moves other steps by 1e-7, one that is seen by 1e-3 and more.
_MOVED = 1e-5


def source_as_long_as_target(graph_module: fx.GraphModule, signature: Signature) -> tuple[str, str] | None:
    """Names of an input whose last step earlier outputs know, and of one whose last step they don't: an encoder's and a
    decoder's, which the network takes at one length alone. None where there is no such pair.
    """
    times = [s for s in signature.symbols if not s.startswith("batch")]
    specs = [s for s in signature.inputs if times and times[0] in s.shape and not _is_mask(s)]
    if len(times) != 1 or len(specs) < 2:
        return None
    sizes = signature.within({s: _BATCH if s.startswith("batch") else _TIME for s in signature.symbols})
    device = next((str(p.device) for p in graph_module.parameters()), "cpu")
    inputs = signature.random_inputs(sizes, device=device)
    length = sizes[times[0]]
    ahead: dict[bool, str] = {}
    with evaluating(graph_module), torch.no_grad():
        try:
            before = leaf_values(graph_module(**inputs))
            for spec in specs:
                after = leaf_values(graph_module(**{**inputs, spec.name: _moved(inputs[spec.name], spec, times[0])}))
                moved = [_steps_moved(a, b, length) for a, b in zip(after, before, strict=True)]
                found = [steps for steps in moved if steps is not None and bool(steps.any())]
                if found:
                    ahead.setdefault(any(bool(steps[:-1].any()) for steps in found), spec.name)
        except (RuntimeError, IndexError):
            return None
    return (ahead[True], ahead[False]) if len(ahead) == 2 else None


def _is_mask(spec: InputSpec) -> bool:
    return spec.mask or (spec.high is None and spec.example is not None and is_mask(spec.example))


def _moved(value: torch.Tensor, spec: InputSpec, time: str) -> torch.Tensor:
    """With another last step."""
    value = value.clone()
    last = value.select(spec.shape.index(time), -1)
    if value.is_floating_point():
        last.add_(torch.randn(last.shape, generator=torch.Generator().manual_seed(0)).to(last))
    else:
        last.copy_((last + 1) % spec.high if spec.high else last + 1)
    return value


def _steps_moved(after: torch.Tensor, before: torch.Tensor, length: int) -> torch.Tensor | None:
    """Of each step of an output, whether it is another one; None for what is no sequence as long."""
    if after.ndim < 2 or after.shape[1] != length or not after.is_floating_point():
        return None
    change_T = (after - before).abs().transpose(0, 1).flatten(1).amax(1)
    return change_T > _MOVED * change_T.max().clamp_min(1e-12)
