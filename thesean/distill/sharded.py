"""Weights in slices, a rank each: fully sharded data parallel (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3).

While a phase trains, a rank holds its slice of each weight of guide and hybrid, of the trained ones its slice of
gradient, moments and float32 master too. A region's weights are gathered when it runs, and when it is computed anew in
the backward (see recompute.py), and let go when the next one runs; gradients are summed into slices as they come.

torch's own `fully_shard` gives each module other parameters, and needs modules that own them; a graph's weights are
read by all that looks into it, a part's by its closed form, between two steps. So a weight stays the tensor that it is,
with nothing in its storage, and is whole again wherever it isn't trained: `whole`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from thesean import exchange, ranks
from thesean.distill.masters import Masters
from thesean.journal import Stateful
from thesean.kernels.shared.precision import HALF

_active: Sharding | None = None


class _Slice:
    """`own` is this rank's slice of a weight, which holds all of it only between `hold` and `free`."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.bytes, self.held = weight, weight.untyped_storage().nbytes(), True
        self.own = exchange.share_of(weight.data.view(-1))

    def hold(self) -> None:
        if not self.held:
            storage = self.weight.untyped_storage()
            if storage.nbytes() < self.bytes:
                storage.resize_(self.bytes)
            # .data: nobody's saved tensor has changed by this
            exchange.gather_shares(self.own, self.weight.data.view(-1))
            self.held = True

    def free(self) -> None:
        storage = self.weight.untyped_storage()
        if storage.resizable():  # else NumPy has looked at it since
            storage.resize_(0)
        self.held = False

    def take(self) -> None:
        """What was written to the weight while it was whole."""
        self.own.copy_(exchange.share_of(self.weight.data.view(-1)))


class Sharding:
    """Of all weights of these networks."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        tied: dict[int, list[nn.Parameter]] = {}
        for weight in dict.fromkeys(p for network in networks for p in network.parameters()):
            tied.setdefault(_key(weight), []).append(weight)
        self.slices: dict[int, _Slice] = {}
        for weight, *others in tied.values():
            if not all(w.is_contiguous() and w.untyped_storage().nbytes() == w.nbytes > 0 for w in (weight, *others)):
                continue
            if not weight.untyped_storage().resizable():  # mapped from a file, or NumPy has looked at it
                weight.data = weight.data.clone()
                for other in others:
                    other.data = weight.data.view(other.shape)
            self.slices[_key(weight)] = _Slice(weight)

    def of(self, weight: torch.Tensor) -> _Slice | None:
        return self.slices.get(_key(weight))

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """These weights, or views of them, and no others."""
        wanted = dict.fromkeys(_key(t) for t in tensors)
        for key, found in self.slices.items():
            if key not in wanted:
                found.free()
        for key in wanted:
            if key in self.slices:
                self.slices[key].hold()

    def gather(self) -> None:
        for found in self.slices.values():
            found.hold()

    def scatter(self) -> None:
        for found in self.slices.values():
            found.take()
            found.free()


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def sharding(networks: Iterable[nn.Module], wanted: bool) -> Iterator[None]:
    """Inside, weights of these networks lie in slices, if that is wanted and there are other ranks."""
    global _active
    if not wanted or ranks.count() == 1:
        yield
        return
    _active = Sharding(networks)
    _active.scatter()
    try:
        yield
    finally:
        now, _active = _active, None
        now.gather()


@contextmanager
def whole() -> Iterator[None]:
    """Inside, weights are whole, and may be written to."""
    global _active
    if _active is None:
        yield
        return
    now, _active = _active, None
    now.gather()
    try:
        yield
    finally:
        now.scatter()
        _active = now


def hold(tensors: Iterable[Any]) -> None:
    """What runs next reads these tensors, weights among them, and no other weights."""
    if _active is not None:
        _active.hold(t for t in tensors if isinstance(t, torch.Tensor))


def masters_of(weights: Sequence[nn.Parameter]) -> Masters:
    return Masters(weights) if _active is None else _Sliced(weights, _active)


class _Sliced(Masters):
    """Masters of slices. What a checkpoint holds is what `Masters` would: it goes on with any number of ranks."""

    def __init__(self, weights: Sequence[nn.Parameter], sharding: Sharding) -> None:
        self._sharding = sharding
        super().__init__(weights)
        slices = [sharding.of(w) for w in weights]
        self._sliced = [
            (w, own, s) for w, own, s in zip(weights, self.parameters, slices, strict=True) if s is not None
        ]
        self._hooks = [w.register_post_accumulate_grad_hook(_summing(own)) for w, own, _ in self._sliced]

    def _master(self, weight: nn.Parameter) -> nn.Parameter:
        found = self._sharding.of(weight)
        if found is None:
            return super()._master(weight)
        return nn.Parameter(found.own.float() if weight.dtype in HALF else found.own)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add_up(self) -> None:
        """Slices are sums already."""
        sliced = {id(own) for _, own, _ in self._sliced}
        exchange.add_up([p.grad for p in self.parameters if p.grad is not None and id(p) not in sliced], "gradients")

    def _finite(self) -> bool:
        return not ranks.any_of(not super()._finite())

    def clip(self, most: float) -> None:
        """By a norm over all ranks' slices, and of what is whole once."""
        gradients = self._gradients
        if not gradients:
            return
        sliced = {id(own) for _, own, _ in self._sliced}
        squares = torch.zeros(2, dtype=gradients[0].dtype, device=gradients[0].device)
        for parameter in self.parameters:
            if parameter.grad is not None:
                squares[int(id(parameter) in sliced)] += parameter.grad.square().sum()
        norm = (squares[0] + exchange.added(squares[1], "norms")).sqrt()
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0).item())

    @torch.no_grad()
    def write(self) -> None:
        for weight, own, found in self._sliced:
            if weight.dtype in HALF:
                found.own.copy_(own)
        sliced = {id(weight) for weight, _, _ in self._sliced}
        for weight, master in self._pairs:
            if id(weight) not in sliced:
                weight.copy_(master)
        if _active is self._sharding:
            self._sharding.hold([])  # what is held is of before the step
        else:  # whole, where a checkpoint is read
            for weight, _, found in self._sliced:
                exchange.gather_shares(found.own, weight.data.view(-1))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "weights": [self.spread(k, p.detach()) for k, p in enumerate(self.parameters)]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        cut = [self.cut(k, value) for k, value in enumerate(state["weights"])]
        super().load_state_dict({**state, "weights": cut})

    def spread(self, number: int, value: torch.Tensor) -> torch.Tensor:
        """All slices of a tensor that belongs to a parameter, on the first rank, which writes them; others' own."""
        own, weight = self.parameters[number], self._weights[number]
        if self._sharding.of(weight) is None or value.shape != own.shape:
            return value
        flat = value.new_empty(weight.numel())
        exchange.gather_shares(value, flat)
        return flat.view(weight.shape).cpu() if ranks.is_first() else value

    def cut(self, number: int, value: torch.Tensor) -> torch.Tensor:
        """This rank's slice of what `spread` gave."""
        weight = self._weights[number]
        if self._sharding.of(weight) is None or value.shape != weight.shape:
            return value
        return exchange.share_of(value.reshape(-1)).to(self.parameters[number].device)

    def kept(self, optimizer: torch.optim.Optimizer) -> Stateful:
        return _States(self, optimizer)


class _States:
    """An optimizer's state as it would be of whole weights."""

    def __init__(self, masters: _Sliced, optimizer: torch.optim.Optimizer) -> None:
        self.masters, self.optimizer = masters, optimizer
        numbers = {id(p): number for number, p in enumerate(masters.parameters)}
        self._numbers = [numbers[id(p)] for group in optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        return self._mapped(self.optimizer.state_dict(), self.masters.spread)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(self._mapped(state, self.masters.cut))

    def _mapped(self, state: dict[str, Any], change: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        changed = {
            place: {k: change(self._numbers[place], v) if v.ndim else v for k, v in values.items()}
            for place, values in state["state"].items()
        }
        return {**state, "state": changed}


def _summing(own: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """Adds this rank's slice of a weight's gradient, summed over ranks, to that of `own`."""

    def summed(weight: torch.Tensor) -> None:
        full, weight.grad = weight.grad, None
        assert full is not None
        part = exchange.sum_shares(full.to(own.dtype).reshape(-1))
        own.grad = part if own.grad is None else own.grad.add_(part)

    return summed
