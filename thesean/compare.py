"""Layer x layer similarity of two models over a data set: one pass, memory that does not grow with the data.

L layers of model a, M of model b, N examples of a batch, P width
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from thesean.converted import Converted
from thesean.distill.callbacks import each_of, length_of
from thesean.errors import DataError, NumericalError
from thesean.module_outputs import module_outputs, select_modules
from thesean.passes.capture.explain import short, where_of
from thesean.passes.graph.modes import evaluating
from thesean.report.comparison import Comparison
from thesean.similarity import Measure, get_measure
from thesean.similarity.shared.hsic import u_centred
from thesean.similarity.shared.layer_cka import LayerCKA
from thesean.similarity.shared.rows import Flatten, rows
from thesean.warn import warn

_MOST = 1024  # batches of data without a length
_CHUNK = 256  # examples of a Gram: more cost memory, fewer precision
_GRAM_BYTES = 256 << 20  # of one batch's Grams, over all layers; smaller chunks hold it

_PART = re.compile(r"part\d*_(?P<part>\d+)(_(?P<place>\d+))?")  # as build_hybrid names them

Paths = dict[str, tuple[str, ...]]
Keep = Callable[[torch.Tensor], Any]
Outputs = dict[str, Any]


def compare(
    model_a: nn.Module | Converted,
    model_b: nn.Module | Converted,
    data: Iterable[Any],
    measure: str = "cka",
    *,
    layers_a: str | Sequence[str] | None = None,
    layers_b: str | Sequence[str] | None = None,
    flatten: Flatten = "example",
) -> Comparison:
    """How similar each layer of `model_a` is to each of `model_b`, over all batches of `data`.

        thesean.compare(bert, student, batches, layers_a="encoder.layer.*", flatten="token").plot("heatmap.png")

    Any two models; of a Converted the target modules are the layers, to be compared with what they replaced, by whose
    path they go too: `layers_a="transformer.h.*.attn"` and `layers_b` alike, or `layers_b="part_*"`. `layers_a`,
    `layers_b`: globs of module names, `*` within a level, `**` over levels; by default the blocks of the outermost
    nn.ModuleList, or every module with weights of its own. A batch is a tensor, a tuple whose first element is the
    input, or a dict, of which each model takes what its forward names. Both run in eval mode without gradients.
    `flatten="token"` makes each position of (..., P) a row; what a dict's `attention_mask` hides is left out.

    "cka" and "cka-debiased" both give the debiased minibatch estimate (Nguyen et al. 2021), from Grams of at most 256
    rows: of batches, the biased form has no meaning. Other measures are averaged over batches, weighted by rows, which
    is exact for mse, cosine, kl and js and depends on the batches' size for others; they hold a batch's activations.

    Raises UnknownNameError for a measure or a glob without a match, DataError for batches or layers that don't fit,
    NumericalError for NaN and infinities; each names the layer.
    """
    chosen = get_measure(measure)
    (model_a, name_a, paths_a), (model_b, name_b, paths_b) = _network(model_a), _network(model_b)
    names_a = select_modules(model_a, layers_a, "layers_a", paths_a)
    names_b = select_modules(model_b, layers_b, "layers_b", paths_b)
    same = model_a is model_b and names_a == names_b
    by_gram = chosen.name in ("cka", "cka-debiased")
    running: LayerCKA | _Averages = LayerCKA() if by_gram else _Averages(chosen)
    labels: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    count = skipped = 0
    with evaluating(model_a), evaluating(model_b):
        for number, batch in enumerate(each_of(data, "data")):
            if number == _MOST and length_of(data) is None:
                warn([f"data tells no length and may have no end: compared on its first {_MOST} batches."])
                break
            mask = batch.get("attention_mask") if flatten == "token" and isinstance(batch, Mapping) else None
            keep = _keeper(by_gram, flatten, mask, len(names_a) + len(names_b))
            try:
                a = _told(module_outputs(model_a, names_a, batch, keep), model_a, paths_a)
                b = a if same else _told(module_outputs(model_b, names_b, batch, keep), model_b, paths_b)
                n = _rows_of(a, b)
            except (DataError, NumericalError) as error:
                raise type(error)(f"batch {number}: {error}") from error
            except (IndexError, RuntimeError) as error:
                told = f"a model does not run on it{where_of(error)}: {short(error)}"
                raise DataError(f"batch {number}: {told}.") from error
            found = (tuple(a), tuple(b))
            labels = labels or found
            if found != labels:
                raise DataError(f"batch {number}: other layers ran than in the first batch. Name them with layers_a=.")
            if n < max(chosen.min_examples, 4 if by_gram else 1):
                skipped += n
                continue
            count += n
            _add(running, a, b)
    if labels is None:
        raise DataError("data is empty: expected at least one batch.")
    if not count:
        raise DataError(f"{chosen.name}: no batch has enough examples, {skipped} in all. Use larger batches.")
    return Comparison(
        measure="cka-debiased" if by_gram else chosen.name,
        estimator="debiased HSIC over minibatches" if by_gram else "mean over batches",
        name_a=name_a,
        name_b=name_b,
        layers_a=labels[0],
        layers_b=labels[1],
        matrix=running.matrix(),
        examples=count,
        skipped=skipped,
    )


def _network(model: nn.Module | Converted) -> tuple[nn.Module, str, Paths]:
    """What is run, what it is called, and whose places the modules of a conversion have taken."""
    if not isinstance(model, Converted):
        if not isinstance(model, nn.Module):
            raise DataError(f"expected a model, found {type(model).__name__}.")
        return model, type(model).__name__, {}
    parts = model.plan.replaced
    paths: Paths = {}
    for node in model.module.graph.find_nodes(op="call_module"):
        name = str(node.target)
        match = _PART.fullmatch(name)
        if match and int(match["part"]) < len(parts):
            part, place = parts[int(match["part"])], int(match["place"] or 0)
            region = part.replaces[place] if place < len(part.replaces) else part.path
            paths[name] = tuple(dict.fromkeys((region, part.path)))
    return model.module, "converted" if parts else "guide", paths


def _told(outputs: Outputs, model: nn.Module, paths: Paths) -> Outputs:
    """By the path of what a module replaced, and its target: "h.0.attn (gru)"."""
    told = {}
    for name, value in outputs.items():
        module, mark, turn = name.partition("#")
        root, dot, below = module.partition(".")
        if root in paths:
            family = getattr(model.get_submodule(root), "family", None)
            name = f"{paths[root][0]}{dot}{below}" + (f" ({family})" if family else "") + mark + turn
        told[name] = value
    return told


def _keeper(by_gram: bool, flatten: Flatten, mask: torch.Tensor | None, layers: int) -> Keep:
    """What is kept of a layer's output: its Grams, or its rows."""

    def keep(output: torch.Tensor) -> Any:
        x_NP = rows("its output", output, flatten, mask)
        n = x_NP.shape[0]
        if not by_gram:
            return x_NP.detach().clone()  # a later module may write into it
        if n < 4:
            return [x_NP.new_zeros(n, n)]
        size = min(_CHUNK, max(16, _GRAM_BYTES // (4 * n * layers)))
        chunks = x_NP.tensor_split(max(1, -(-n // size)))
        grams = [u_centred(chunk_NP) for chunk_NP in chunks]
        if not all(bool(gram_NN.sum().isfinite()) for gram_NN in grams):
            raise NumericalError("its output holds NaN or infinite values, or values whose squares overflow.")
        return grams

    return keep


def _rows_of(a: Outputs, b: Outputs) -> int:
    """How many rows the layers have: all as many."""
    counts = [(name, sum(map(len, v)) if isinstance(v, list) else len(v)) for x in (a, b) for name, v in x.items()]
    first, n = counts[0]
    for name, other in counts:
        if other != n:
            raise DataError(
                f"{name} has {other} rows where {first} has {n}. Rows must be the same examples: choose other layers, "
                "or flatten='example'."
            )
    return n


def _add(running: LayerCKA | _Averages, a: Outputs, b: Outputs) -> None:
    if isinstance(running, LayerCKA):
        for grams_a, grams_b in zip(zip(*a.values(), strict=True), zip(*b.values(), strict=True), strict=True):
            running.add(grams_a, [gram_NN.to(grams_a[0].device) for gram_NN in grams_b])
    else:
        running.add(a, b)


class _Averages:
    """The measure of each batch, weighted by its rows."""

    def __init__(self, measure: Measure) -> None:
        self.measure, self.examples = measure, 0
        self.total_LM = torch.zeros((), dtype=torch.float64)

    def add(self, a: Outputs, b: Outputs) -> None:
        n = len(next(iter(a.values())))
        values = []
        for name_a, x_NP in a.items():
            for name_b, y_NQ in b.items():
                try:
                    values.append(self.measure.value(x_NP, y_NQ.to(x_NP.device)).double().cpu())
                except (DataError, NumericalError) as error:
                    raise type(error)(f"{name_a} and {name_b}: {error}") from error
        self.total_LM = self.total_LM + n * torch.stack(values).view(len(a), len(b))
        self.examples += n

    def matrix(self) -> torch.Tensor:
        return self.total_LM / self.examples
