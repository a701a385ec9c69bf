"""How good networks and files are, all on the same batches: distance from the guide, loss, metric.

B batch, T time, V classes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from thesean.deploy.session import Session
from thesean.deploy.states import Arrays, arrays_of
from thesean.distill.callbacks import checked_loss, checked_metric
from thesean.distill.data import Batches, Reading, labels_in
from thesean.distill.evaluate import Evaluation, Judge
from thesean.distill.losses import accuracy, cross_entropy, next_token
from thesean.distill.outputs import OutputKind, read_outputs
from thesean.distill.row_tables import as_batches
from thesean.distill.task import Loss, Metric, Task, primary
from thesean.errors import DataError
from thesean.passes.graph.signature import Signature, output_wrapper


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What outputs are judged by, beside their distance from the guide's. Where neither is given, labels that fit the
    guide's logits bring `cross_entropy` and `accuracy`, and a model of text that `decodes` is asked for the next token.
    """

    loss: Loss | None = None
    metric: Metric | None = None
    outputs: Mapping[str, OutputKind] | None = None  # how each is compared, where the guess is wrong
    decodes: bool = False


class Judged:
    """Networks by `module`, files by `file`.

    Raises DataError for batches that don't fit, or where there is none.
    """

    def __init__(
        self,
        guide: fx.GraphModule,
        signature: Signature,
        data: Iterable[Any],
        reading: Reading,
        asked: Asked,
    ) -> None:
        home = next((p.device for p in guide.parameters()), torch.device("cpu"))
        self.batches = list(Batches(as_batches(data), signature, home, reading))
        if not self.batches:
            raise DataError("data is empty: expected at least one batch.")
        batch, inputs = self.batches[0]
        other = _others(signature, inputs, str(home))
        guide.eval()
        with torch.no_grad():
            self._shape = guide(**inputs)
            observed = [self._shape, guide(**other)]
        labels = labels_in(batch, len(signature.inputs))
        wrap = output_wrapper(signature)
        loss, metric = asked.loss, asked.metric
        if loss is None and metric is None:
            loss, metric = _usual(self.batches, wrap(self._shape), labels, asked.decodes)
        outputs = read_outputs(observed, labels, asked.outputs)
        task = Task(loss=checked_loss(loss), metric=checked_metric(metric), outputs=outputs, wrap=wrap)
        self.unit = "nats" if outputs.in_nats else "shares of the variance"
        rows = sum(next(iter(inputs.values())).shape[0] for _, inputs in self.batches)
        self.told = f"judged on {rows:,} rows" + (f", loss {_name(loss)}" if loss else "")
        self._judge = Judge(guide, task, self.batches)

    def module(self, network: fx.GraphModule) -> Evaluation:
        """Of a network in torch, which a file without whole numbers was compared with when it was written."""
        return self._judge(network)

    def file(self, session: Session) -> Evaluation:
        """Of a file in onnxruntime, whole sequences at once."""

        return self._judge.of(lambda number: run_as(self._shape, session, self.batches[number][1]))


def _others(signature: Signature, inputs: Mapping[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """Inputs of the same sizes that differ: whoever made data by our seed has the very numbers that are drawn first."""
    sizes, made = signature.check(dict(inputs)), {}
    for seed in range(3):
        made = signature.random_inputs(sizes, seed=seed, device=device)
        if any(not torch.equal(made[name], value) for name, value in inputs.items()):
            break
    return made


def run_as(shape: Any, session: Session, inputs: Mapping[str, torch.Tensor]) -> Any:
    """What a file makes of whole sequences, nested as an output of the network is."""
    return _filled(shape, "", {n: torch.from_numpy(v) for n, v in _whole(session, arrays_of(inputs)).items()})


def _usual(
    batches: Sequence[tuple[Any, Any]], output: Any, labels: list[torch.Tensor], decodes: bool
) -> tuple[Loss | None, Metric | None]:
    logits = primary(output)
    for y in labels:
        if logits.ndim > 1 and not y.is_floating_point() and y.shape == logits.shape[:-1]:
            return cross_entropy, accuracy
    ids = [_ids(batch) for batch, _ in batches]
    if not decodes or logits.ndim != 3 or ids[0] is None or ids[0].shape != logits.shape[:-1] or ids[0].shape[1] < 2:
        return None, None
    # a tagger of tokens has as many rows, and fewer classes than there are tokens
    classes = logits.shape[-1]
    return (next_token if all(x is not None and x.numel() and int(x.max()) < classes for x in ids) else None), None


def _ids(batch: Any) -> torch.Tensor | None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if isinstance(ids, (tuple, list)) and ids:
        ids = ids[0]
    return ids if isinstance(ids, torch.Tensor) and not ids.is_floating_point() else None


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _whole(session: Session, given: Arrays) -> Arrays:
    """All outputs in their places, of a file whose outputs come late too."""
    if not session.delay:
        return session.run_whole(given)[0]
    stream = session.stream()
    pieces = stream(given), stream.end()
    whole = {}
    for name, value in pieces[1].items():
        dim = session.steps_dim(name)
        late = value.ndim > dim and value.shape[dim] == session.delay
        whole[name] = np.concatenate([piece[name] for piece in pieces], dim) if late else value
    return whole


def _filled(shape: Any, prefix: str, values: Mapping[str, torch.Tensor]) -> Any:
    """A nested output of this shape with a file's values, which have the names of its leaves."""
    if isinstance(shape, torch.Tensor):
        return values[prefix or "output"].to(shape.device)
    if isinstance(shape, Mapping):
        return {k: _filled(v, f"{prefix}.{k}" if prefix else str(k), values) for k, v in shape.items()}
    if isinstance(shape, (tuple, list)):
        return type(shape)(_items(shape, prefix, values))
    return shape


def _items(shape: Any, prefix: str, values: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    for index, inner in enumerate(shape):
        yield _filled(inner, f"{prefix}.{index}" if prefix else f"output_{index}", values)
