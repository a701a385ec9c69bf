"""Find the causal attentions of a graph, and read numerically which keys their queries see.

Where softmax(q k' + mask) v stands is found in the graph. What the mask does is not matched against known spellings: it
is evaluated where all scores are zero, at a short and at a long length, and what is read so is held against the graph
on random queries, keys and values.

B batch, T time, H heads of queries, G heads of keys and values, K head width
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from thesean.errors import PassRefused
from thesean.passes.analyse.attention_cores import ADDED, VIEWS, CausalAttention, Scores, find_cores
from thesean.passes.analyse.distance_bias import LOW, find_distance_bias
from thesean.passes.analyse.padding import Padding, Rule
from thesean.passes.analyse.sides import BATCH, Sides
from thesean.passes.graph.cache import CachedAttention, SeenKeys
from thesean.passes.graph.nodes import above, attribute, compute
from thesean.passes.graph.record import evaluate_all
from thesean.passes.graph.signature import Signature
from thesean.targets.shared.distance_bias import Reach

aten = torch.ops.aten

# Windows of more steps than this are not looked for: reading them takes memory quadratic in their size.
_LONGEST = 8192
_MOST_SCORES = 2**28

_CLOSE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
_OPPOSITE: dict[Rule, Rule] = {"true": "false", "false": "true", "one": "zero", "zero": "one"}


def causal_attentions(graph_module: fx.GraphModule, signature: Signature) -> list[CausalAttention]:
    """Those that a cache of keys and values can stand for, in the graph's order; what looks ahead is none of them.

    Raises PassRefused, naming the part, for a causal one that it can't: a bias of more than the distance, a pattern
    that is no window, a mask of values that is not one of padded steps.
    """
    sides = Sides(graph_module, signature)
    reader = _Reader(graph_module, sides)
    return [core for found in find_cores(sides) if (core := reader.read(*found)) is not None]


class _Reader:
    def __init__(self, graph_module: fx.GraphModule, sides: Sides) -> None:
        self.graph_module = graph_module
        self.sides = sides
        self.time, self.values, self.mains = sides.time, sides.values, sides.mains
        self.known: dict[Any, Any] = {}  # layers share their masks

    # what a mask lets through

    def read(self, core: CausalAttention, scores: Scores) -> CausalAttention | None:
        at_zero = self._at_zero(scores, BATCH, self.time)
        if at_zero is None:
            return None
        seen = at_zero > LOW
        if bool((seen & ~_causal(self.time)).any()):
            return None  # it looks ahead: its part is told of where the whole is run
        window = self._window(core, scores, seen)
        core = replace(core, window=window, padding=self._padding(core, scores, window))
        if bool((at_zero[seen].abs() > 1e-4).any()):
            distance = self._distance(core, at_zero, scores)
            core = replace(core, distance=distance, counted=self._counted(core, distance, scores))
        core = self._grouped(replace(core, sink=self._sink(core, scores)))
        if not self._equals(core):
            raise PassRefused(
                f"cache attention: {core.path}: expected softmax(scale q k' + mask) v, found an attention that it "
                "does not reproduce (a gate or a norm of its weights). Convert it too."
            )
        return core

    @torch.no_grad()
    def _at_zero(
        self, scores: Scores, batch: int, time: int, given: Mapping[fx.Node, Any] | None = None
    ) -> torch.Tensor | None:
        """What the softmax reads where q k' is zero, (batch, heads or 1, time, time); None where that is not told."""
        key = (scores.steps if scores.product else (scores.sides, scores.causal), batch, time)
        if given is None and key in self.known:
            return self.known[key]
        env = self.sides.at(scores.sides, batch, time, given or {})
        if env is None:
            return None
        if scores.product is None:
            result = _mask_values(env[scores.sides[0]] if scores.sides else torch.zeros(1, 1, time, time))
            if scores.causal:
                result = result.masked_fill(~_causal(time), -torch.inf)
        else:
            result = self._chain(scores, env, batch, time)
            if isinstance(scores.sink, int):
                result = result[..., 1:] if scores.sink == 0 else result[..., :-1]
        if result.ndim < 4:
            result = result.reshape(*(() if result.ndim == 2 else (batch, -1)), *result.shape[-2:])
        result = result.expand(batch, -1, time, time) if result.ndim == 4 else result.expand(batch, 1, time, time)
        if given is None:
            self.known[key] = result
        return result

    def _sink(self, core: CausalAttention, scores: Scores) -> torch.Tensor | None:
        """The score of each head's key that stands for no step; None where there is none, or where it isn't one."""
        heads = self.values[core.query].shape[1]
        if isinstance(scores.sink, fx.Node):
            score_H = self.values[scores.sink].flatten()
            return score_H.detach().clone() if len(score_H) == heads else None
        if scores.sink is None or (env := self.sides.at(scores.sides, BATCH, self.time, {})) is None:
            return None
        columns_BHT = self._chain(scores, env, BATCH, self.time)[..., scores.sink]
        if columns_BHT.ndim != 3 or not bool((columns_BHT == columns_BHT[:1, :, :1]).all()):
            return None
        return columns_BHT[0, :, 0].detach().clone()

    def _chain(self, scores: Scores, env: dict[fx.Node, Any], batch: int, time: int) -> torch.Tensor:
        assert scores.product is not None
        like = self.values[scores.product]
        whole = self.sides.resized(like.shape, batch, time)
        shapes = [whole] if batch == BATCH else [[1] * (like.ndim - 2) + [time, time], whole]
        for shape in shapes:
            known = dict(env)
            known[scores.product] = torch.zeros(shape, dtype=torch.float32)
            if scores.product.target is ADDED:
                beta = scores.product.kwargs.get("beta", 1.0)
                known[scores.product] = beta * env[scores.product.all_input_nodes[0]].expand(whole).float()
            try:
                for node in scores.steps:
                    for read in node.all_input_nodes:
                        if read not in known:
                            known[read] = self.sides.size(read, batch, time)
                    known[node] = compute(node, known.__getitem__)
                return known[scores.steps[-1]] if scores.steps else known[scores.product]
            except RuntimeError:
                if shape is whole:
                    raise
        raise AssertionError

    def _window(self, core: CausalAttention, scores: Scores, seen: torch.Tensor) -> int | None:
        """Steps that a query sees at most, its own included; None for all. A window that is no shorter than the
        recording is looked for past the largest number that stands in the making of the mask.
        """
        numbers = self._numbers(scores.sides)
        longest = max(numbers, default=0)
        if longest >= self.time:
            for time in (longest + 2, longest):
                if longest * longest > _MOST_SCORES:
                    break
                try:
                    at_zero = self._at_zero(scores, 1, time)
                except (RuntimeError, IndexError):  # past a stored mask's last row
                    continue
                if at_zero is not None:
                    return self._pattern(core, at_zero > LOW)
        return self._pattern(core, seen)

    def _pattern(self, core: CausalAttention, seen: torch.Tensor) -> int | None:
        time = seen.shape[-1]
        size = int(seen[0, 0].sum(-1).max())
        if torch.equal(seen, _causal(time, size).expand_as(seen)):
            return size if size < time else None
        raise PassRefused(
            f"cache attention: {core.path}: expected queries that see all earlier keys, or the last ones, found a "
            "mask of another pattern. Convert it too."
        )

    def _distance(self, core: CausalAttention, at_zero: torch.Tensor, scores: Scores) -> Reach:
        """The bias of each distance, past the last one that the guide's own length tells too."""

        def at_length(time: int) -> torch.Tensor | None:
            try:
                longer = self._at_zero(scores, 1, time)
            except (RuntimeError, IndexError):  # past a stored bias's last row
                return None
            return None if longer is None else longer[0]

        alike = bool((at_zero == at_zero[:1]).all())
        found = find_distance_bias(at_zero[0], at_length) if alike and core.window is None else None
        if found is None:
            raise PassRefused(
                f"cache attention: {core.path}: expected scores to which a mask is added, or a bias of the distance "
                "of query and key alone (ALiBi, relative positions), found one of another kind. Convert it too."
            )
        return found.behind

    def _counted(self, core: CausalAttention, distance: Reach, scores: Scores) -> bool:
        """Whether distances are those of tokens, as a mask counts them, and not of steps. Raises PassRefused where they
        are neither.
        """
        if core.padding is None:
            return False
        token_BT = torch.ones(BATCH, self.time, dtype=torch.bool)
        token_BT[0, self.time // 3 : self.time // 2] = False
        at_zero = self._at_zero(scores, BATCH, self.time, self._masked(core.padding, token_BT))
        pairs = (_causal(self.time) & token_BT.unsqueeze(1) & token_BT.unsqueeze(2)).unsqueeze(1)
        for counted in (False, True) if at_zero is not None else ():
            bias, _ = SeenKeys(None, torch.float32, distance, counted)(token_BT)
            apart = (at_zero - bias).masked_fill(~pairs, 0.0)
            own = apart.diagonal(dim1=2, dim2=3).unsqueeze(-1)  # constants of a row cancel
            if bool(((apart - own).masked_fill(~pairs, 0.0).abs() <= 1e-4).all()):
                return counted
        raise PassRefused(
            f"cache attention: {core.path}: expected a bias of the distance in steps or in tokens, found one that a "
            "mask of padded steps changes in another way. Convert it too."
        )

    def _masked(self, padding: Padding, token_BT: torch.Tensor) -> dict[fx.Node, torch.Tensor]:
        """What a mask that shows `token_BT` holds: the input that it is made of, where that is one too, or else
        the node that is read for it.
        """
        node = next(n for n in self.sides.order if n.name == padding.node)
        wanted = _mask_of(padding, self.values[node], token_BT)
        for source in (n for n in self.sides.behind([node]) if n.op == "placeholder"):
            like = self.values[source]
            for rule in _rules(like.dtype) if like.shape == token_BT.shape else ():
                given = {source: _mask_of(Padding(node=source.name, rule=rule), like, token_BT)}
                env = self.sides.at([node], BATCH, self.time, given)
                if env is not None and torch.equal(env[node], wanted):
                    return given
        return {node: wanted}

    def _numbers(self, sides: Iterable[fx.Node]) -> set[int]:
        """Whole numbers of some size in the making of a mask: a window's may be among them."""
        found: set[int] = set()
        for node in self.sides.behind(sides):
            given = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int)]
            if node.op == "get_attr":
                value = attribute(self.graph_module, str(node.target))
                given = list(value.shape) if value.numel() > 1 else [abs(int(v)) for v in value.flatten().float()]
            found.update(abs(int(v)) for v in given)
        return {v for v in found if 1 < v <= _LONGEST}

    def _padding(self, core: CausalAttention, scores: Scores, window: int | None) -> Padding | None:
        """What shows the keys that hold a token; None where no input's values enter."""
        valued = self.sides.behind(scores.sides)
        if not any(n.op == "placeholder" for n in valued):
            return None
        for node in valued:
            value = self.values[node]
            if not isinstance(value, torch.Tensor) or value.shape != (BATCH, self.time):
                continue
            if not any(n.op == "placeholder" for n in self.sides.behind([node])):
                continue
            key = ("padding", node, scores.sides, window)
            if key not in self.known:
                rules = _rules(value.dtype)
                self.known[key] = next(
                    (r for r in rules if self._shows(Padding(node=node.name, rule=r), node, scores, window)), None
                )
            if self.known[key] is not None:
                return Padding(node=node.name, rule=self.known[key])
        raise PassRefused(
            f"cache attention: {core.path}: expected a mask that hides padded steps, found one that depends on "
            "values of the inputs in another way. Convert it too."
        )

    def _shows(self, padding: Padding, node: fx.Node, scores: Scores, window: int | None) -> bool:
        """Whether a query sees the keys that a random mask shows, and no other; first steps hold a token."""
        like = self.values[node]
        generator = torch.Generator().manual_seed(4)
        token_BT = torch.rand(like.shape, generator=generator) < 0.6
        token_BT[:, 0] = True
        at_zero = self._at_zero(scores, BATCH, self.time, {node: _mask_of(padding, like, token_BT)})
        if at_zero is None:
            return False
        want = (_causal(self.time, window) & token_BT[:, None, None, :]).expand_as(at_zero)
        rows = token_BT[:, None, :, None].expand_as(at_zero)  # what a hidden step sees is its own affair
        return torch.equal((at_zero > LOW)[rows], want[rows])

    # queries, keys and values

    def _grouped(self, core: CausalAttention) -> CausalAttention:
        """Keys and values as they were before their heads were repeated, and before keys were transposed."""
        key, turned = core.key, core.turned
        if turned and key.target is aten.transpose.int and {int(d) % self.values[key].ndim for d in key.args[1:]} == {  # type: ignore[arg-type]
            self.values[key].ndim - 2, self.values[key].ndim - 1,
        }:  # fmt: skip
            key, turned = key.all_input_nodes[0], False
        core = replace(core, key=key, turned=turned)
        if core.packed or turned:
            return core
        heads = self.values[core.query].shape[1]
        shared = [self._before_repeats(n, heads) for n in (core.key, core.value)]
        if self.values[shared[0]].shape[1] != self.values[shared[1]].shape[1]:
            return core
        return replace(core, key=shared[0], value=shared[1])

    def _before_repeats(self, node: fx.Node, heads: int) -> fx.Node:
        whole = self.values[node]
        found = at = node
        while at.target in VIEWS:
            at = at.all_input_nodes[0]
            value = self.values[at]
            if value.ndim != 4 or value.shape[2:] != whole.shape[2:] or heads % value.shape[1]:
                continue
            if torch.equal(value.repeat_interleave(heads // value.shape[1], 1), whole):
                found = at
        return found

    @torch.no_grad()
    def _equals(self, core: CausalAttention) -> bool:
        """Whether the module that is to stand here gives what the graph does, on random queries, keys and values."""
        generator = torch.Generator().manual_seed(5)
        given = {
            n: torch.randn(self.values[n].shape, generator=generator).to(self.values[n])
            for n in (core.query, core.key, core.value)
        }
        reached, nodes = set(given), []
        for node in sorted(above([core.mixed], set(given)) & self.mains, key=self.sides.order.__getitem__):
            if not reached.isdisjoint(node.all_input_nodes):  # beside these stands what lends its dtype alone
                reached.add(node)
                nodes.append(node)
        want = evaluate_all(nodes, self.values, given, last=core.mixed)[core.mixed]
        query, key, value = (given[n] for n in (core.query, core.key, core.value))
        key = key.transpose(-2, -1) if core.turned else key
        if core.packed:
            query, key, value = (x.unflatten(0, (-1, core.packed)) for x in (query, key, value))
        if key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1] or query.shape[2] != self.time:
            return False  # of steps that aren't the inputs', such as frames of a signal
        token_BT = torch.ones(BATCH, self.time, dtype=torch.bool, device=query.device)
        bias, _ = SeenKeys(core.window, query.dtype, core.distance, core.counted)(token_BT)
        got, _ = CachedAttention(core.scale, core.cap, core.window, core.sink)(query, key, value, bias)
        got = got.flatten(0, 1) if core.packed else got
        bound = _CLOSE.get(want.dtype, 1e-4) * max(1.0, want.abs().max().item())
        return got.shape == want.shape and bool(((got - want).abs() <= bound).all())


def _causal(time: int, window: int | None = None) -> torch.Tensor:
    step_T = torch.arange(time)
    age_TT = step_T.unsqueeze(1) - step_T
    return (age_TT >= 0) & (age_TT < (time if window is None else window))


def _mask_values(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.float()


def _rules(dtype: torch.dtype) -> tuple[Rule, ...]:
    if dtype == torch.bool:
        return ("true", "false")
    return ("one", "additive") if dtype.is_floating_point else ("one", "zero")


def _mask_of(padding: Padding, like: torch.Tensor, token_BT: torch.Tensor) -> torch.Tensor:
    return torch.where(token_BT.to(like.device), padding.all_seen(like), _all_hidden(padding, like))


def _all_hidden(padding: Padding, like: torch.Tensor) -> torch.Tensor:
    if padding.rule == "additive":
        return torch.full_like(like, torch.finfo(like.dtype).min)
    return Padding(node=padding.node, rule=_OPPOSITE[padding.rule]).all_seen(like)
