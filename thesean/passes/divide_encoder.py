"""Divide an encoder-decoder: what is made of the source alone, once, and what goes step by step beside it.

B batch, T steps of the target
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem

import torch
from torch import fx

from thesean.errors import PassRefused
from thesean.passes.analyse.crossing import crossings
from thesean.passes.analyse.entered import ROWS, Entered, Pair, what_enters
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.halves import DECODER, ENCODER, HALVES, HELD, Halves, halves_of
from thesean.passes.graph.nodes import above, leaf_nodes
from thesean.passes.graph.signature import InputSpec, Signature

aten = torch.ops.aten

# what costs, and so is worth to be done once
_WEIGHED = {
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default, aten.einsum.default, aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default,
    aten.conv2d.padding, aten.embedding.default,
}  # fmt: skip

_VIEWS = {
    aten.expand.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.flatten.using_ints,
    aten.transpose.int, aten.repeat_interleave.self_int, aten.clone.default, aten.contiguous.default,
}  # fmt: skip

_TIME = "time"

# Where a size is read: a tensor and one of its dimensions
Places = Mapping[Pair, tuple[fx.Node, int]]


@dataclass(frozen=True)
class DivideEncoder(Pass):
    """y_BT = network(source, target_BT)  =>  y_BT = decoder(target_BT, *encoder(source)).

    The target are the inputs of the one length along which an output goes that depends on source and target; the source
    are the others. The encoder is all that the source alone decides, each cross attention's keys and values among it,
    and those of the outputs. What crosses is the last of that: no product of weights with the source is left in the
    decoder, whose inputs are the target, its length called "time", and `encoded_0`..., batch first, `held` and of any
    length. Masks and positions of sizes alone are made where they are read. `meta["halves"]` says how both are called.
    The new graph shares its parameters with the incoming one, which stays as it was.

    Raises PassRefused where no target is told from a source, and for what can't cross, by its node.
    """

    in_place = False

    signature: Signature

    def requires(self, graph_module: fx.GraphModule) -> None:
        read = [s for s in self.signature.inputs if s.name in _read(graph_module)]
        lengths = [s for s in self.signature.symbols if not s.startswith("batch")]
        if not any(name not in s.shape for name in lengths for s in read):
            found = ", ".join(s.describe() for s in read) or "none"
            raise PassRefused(
                "divide encoder: expected inputs of a decoder, whose length is free, and an encoder's without that "
                f"length, found {found}."
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        try:
            entered = what_enters(graph_module, self.signature)
        except PassRefused as refusal:
            raise PassRefused(f"divide encoder: {refusal}") from refusal
        cut = _Cut(entered, self.signature, _length_of_target(entered, self.signature))
        new = fx.GraphModule({ENCODER: cut.encoder(), DECODER: cut.decoder()}, cut.whole())
        new.meta.update(graph_module.meta)
        new.meta[HALVES] = cut.halves()
        new.train(graph_module.training)
        return PassResult(graph_module=new, modified=True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        super().ensures(graph_module)
        encoder, decoder, _ = halves_of(graph_module)
        encoder.graph.lint()
        decoder.graph.lint()
        constant: set[fx.Node] = set()
        source: set[fx.Node] = set()
        for node in decoder.graph.nodes:
            behind = set(node.all_input_nodes)
            if node.op == "get_attr" or (behind and behind <= constant):
                constant.add(node)
            elif HELD in node.meta or (behind and behind <= constant | source and node.target is not aten.sym_size.int):
                source.add(node)
                kept = not (node.target in _WEIGHED and behind & constant)
                self._expect(kept, f"no product of weights with the source in the decoder, such as {node.name},")


def _first_of_equals(nodes: Iterable[fx.Node], among: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Of each node the first one that is the same operator of the same values."""
    found: dict[fx.Node, fx.Node] = {}
    seen: dict[str, fx.Node] = {}
    for node in nodes:
        found[node] = node
        if node.op == "get_attr" or (node.op == "call_function" and node in among):
            given = fx.map_arg((node.args, dict(node.kwargs)), found.__getitem__)
            found[node] = seen.setdefault(f"{node.op} {node.target} {given}", node)
    return found


def _read(graph_module: fx.GraphModule) -> set[str]:
    return {str(n.target) for n in graph_module.graph.find_nodes(op="placeholder") if n.users}


def _length_of_target(entered: Entered, signature: Signature) -> str:
    read = _read(entered.graph_module)
    outputs = leaf_nodes(entered.graph_module.graph.output_node().args[0])
    lengths = [name for name, pair in entered.pairs.items() if pair != ROWS]
    found = []
    for name in lengths:
        target = {s.name for s in signature.inputs if name in s.shape} & read
        both = [n for n in outputs if entered.values[n] & target and entered.values[n] & (read - target)]
        if any(entered.pairs[name] in entered.shape(n) for n in both):
            found.append(name)
    if len(found) == 1:
        return found[0]
    raise PassRefused(
        "divide encoder: expected one length along which an output goes that depends on inputs with and without it, a "
        f"decoder's; found {' and '.join(found) or 'none'} among {', '.join(lengths)}."
    )


class _Cut:
    """A network with its nodes told apart: `early` are those that the source alone decides."""

    def __init__(self, entered: Entered, signature: Signature, length: str) -> None:
        self.entered, self.signature, self.length = entered, signature, length
        self.root = entered.graph_module
        self.nodes = list(self.root.graph.nodes)
        self.inputs = {str(n.target): n for n in self.root.graph.find_nodes(op="placeholder")}
        self.outputs = leaf_nodes(self.root.graph.output_node().args[0])
        self.targets = [s for s in signature.inputs if length in s.shape]
        self.sources = [s for s in signature.inputs if length not in s.shape]
        names = {s.name for s in self.targets}
        self.late = {n for n in self.nodes if entered.values[n] & names or length in entered.sizes[n]}
        self.early = {n for n in self.nodes if n not in self.late and entered.values[n]}
        if not any(n.target in _WEIGHED or n.op == "call_module" for n in self.early):
            told = ", ".join(s.name for s in self.sources)
            raise PassRefused(f"divide encoder: expected an encoder, found no product of weights with {told} alone.")
        self.places = self._places(self.targets)
        repeats = {n for read in self._read(self.early) for n in self._repeats(read)}
        self.stop = self.early - repeats
        self.later = self._later(self.stop)
        # as layers that make the same mask each do
        first = _first_of_equals(self.nodes, self.stop)
        self.same = {n: first[n] for n in self._read(self.stop)}
        self.crossing = crossings([n for n in self.nodes if n in self.same.values()], entered, signature)

    def _later(self, stop: set[fx.Node]) -> set[fx.Node]:
        return self._above(self.outputs, self.places, stop)

    def _read(self, stop: set[fx.Node]) -> list[fx.Node]:
        """What is read of these, and not for its size alone."""
        read: set[fx.Node] = set()
        for node in self._later(stop):
            if node.target is not aten.sym_size.int:
                read.update(stop.intersection(node.all_input_nodes))
        return [n for n in self.nodes if n in read]

    def _repeats(self, node: fx.Node) -> list[fx.Node]:
        """The last views that made a mask larger, a row for each head: so many need not cross."""
        if any(n.target in _WEIGHED or n.op == "call_module" for n in above([node])):
            return []
        found, numbers = [node], [self._count(node)]
        while found[-1].target in _VIEWS and self.entered.values[found[-1].all_input_nodes[0]]:
            found.append(found[-1].all_input_nodes[0])
            numbers.append(self._count(found[-1]))
        return found[: numbers.index(min(numbers))]

    def _count(self, node: fx.Node) -> int:
        return self.entered.runs[0][node].numel() if self.entered.is_tensor(node) else 0

    def _places(self, specs: Iterable[InputSpec]) -> Places:
        """Where a half reads free sizes off its own inputs."""
        found: dict[Pair, tuple[fx.Node, int]] = {}
        for spec in specs:
            for dim, name in enumerate(spec.shape):
                if isinstance(name, str):
                    found.setdefault(self.entered.pairs[name], (self.inputs[spec.name], dim))
        return found

    def _place(self, node: fx.Node, places: Places) -> tuple[fx.Node, int] | None:
        pair = self.entered.number(node) if node.target is aten.sym_size.int else None
        return None if pair is None else places.get(pair)

    def _above(self, ends: Iterable[fx.Node], places: Places, stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
        """`ends` and all that they are made of, but for `stop`; sizes that an input has are read off it."""
        stopping = set(stop)
        found: set[fx.Node] = set()
        front = list(ends)
        while front:
            node = front.pop()
            if node in found or node in stopping:
                continue
            found.add(node)
            if self._place(node, places) is None:
                front.extend(node.all_input_nodes)
        return found

    def encoder(self) -> fx.GraphModule:
        places = self._places(self.sources)
        own = [n for n in self.outputs if n in self.early]
        graph, known = self._start(self.sources)
        self._copy(graph, known, self._above([*(c.node for c in self.crossing), *own], places), places)
        crossing = [known[c.node] if c.there is None else c.there.write(graph, known[c.node]) for c in self.crossing]
        graph.output((*crossing, *(known[n] for n in own)))
        return self._module(graph)

    def decoder(self) -> fx.GraphModule:
        graph, known = self._start(self.targets)
        held = [graph.placeholder(c.spec.name) for c in self.crossing]
        lengths: dict[Pair, tuple[fx.Node, int]] = {}
        for c, placeholder in zip(self.crossing, held, strict=True):
            placeholder.meta[HELD] = True
            for dim, pair in enumerate(c.shape):
                if pair[0] != pair[1]:
                    lengths.setdefault(pair, (placeholder, dim))
        for c, placeholder in zip(self.crossing, held, strict=True):
            known[c.node] = placeholder if c.back is None else c.back.write(graph, placeholder)
            known[c.node].meta.update({k: v for k, v in c.node.meta.items() if k == "val"}, **{HELD: True})
        known.update({n: known[first] for n, first in self.same.items()})
        self._copy(graph, known, self.later, self.places, lengths)
        graph.output(tuple(known[n] for n in self.outputs if n not in self.early))
        return self._module(graph)

    def _start(self, specs: Sequence[InputSpec]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
        graph = fx.Graph()
        return graph, {self.inputs[s.name]: graph.node_copy(self.inputs[s.name]) for s in specs}

    def _copy(
        self,
        graph: fx.Graph,
        known: dict[fx.Node, fx.Node],
        wanted: set[fx.Node],
        places: Places,
        lengths: Places | None = None,
    ) -> None:
        """`lengths`: where a size is read whose own tensor is the other half's, off nodes of the new graph."""
        for node in self.nodes:
            if node not in wanted or node in known:
                continue
            place = self._place(node, places)
            if place is not None:
                place = known[place[0]], place[1]
            elif node.target is aten.sym_size.int and node.all_input_nodes[0] not in known:
                place = self._place(node, lengths or {})
            if place is not None:
                known[node] = graph.call_function(aten.sym_size.int, place)
                known[node].meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}
            elif node.op == "placeholder" or any(i not in known for i in node.all_input_nodes):
                raise PassRefused(
                    f"divide encoder: {node.name}: expected sizes that a half finds in what it is given, found "
                    "another one."
                )
            else:
                known[node] = graph.node_copy(node, known.__getitem__)

    def _module(self, graph: fx.Graph) -> fx.GraphModule:
        half = fx.GraphModule(self.root, graph)
        half.meta.update(self.root.meta)  # whether it trains is its root's, too
        return half

    def whole(self) -> fx.Graph:
        graph, known = self._start(self.signature.inputs)
        sources, targets = ([known[self.inputs[s.name]] for s in specs] for specs in (self.sources, self.targets))
        encoded = graph.call_module(ENCODER, tuple(sources))
        given = [graph.call_function(getitem, (encoded, k)) for k in range(len(self.crossing))]
        decoded = graph.call_module(DECODER, (*targets, *given))
        found = {
            node: graph.call_function(getitem, (encoded if is_source else decoded, at))
            for node, (is_source, at) in zip(self.outputs, self._leaves(), strict=True)
        }
        graph.output(fx.map_arg(self.root.graph.output_node().args[0], found.__getitem__))
        return graph

    def _leaves(self) -> Iterator[tuple[bool, int]]:
        """Of each output, whether it is the encoder's, and which one of those that it gives."""
        counts = {True: len(self.crossing), False: 0}
        for node in self.outputs:
            is_source = node in self.early
            yield is_source, counts[is_source]
            counts[is_source] += 1

    def halves(self) -> Halves:
        plain = replace(self.signature, output_class=None, record=None)
        here = [replace(b, name=_TIME) for b in self.signature.bounds if b.name == self.length]
        there = [b for b in self.signature.bounds if b.name != self.length]
        targets = [replace(s, shape=tuple(_TIME if d == self.length else d for d in s.shape)) for s in self.targets]
        return Halves(
            encoder=replace(plain, inputs=tuple(self.sources), bounds=tuple(there)),
            decoder=replace(plain, inputs=(*targets, *(c.spec for c in self.crossing)), bounds=tuple(here)),
            length=self.length,
            leaves=tuple(self._leaves()),
        )
