"""Operators of other libraries, and those of torch that are seldom, become the plain ones that they are made of: what
can be saved, given a state and exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._library.custom_ops import OPDEFS
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

from thesean.kernels.grouped_product import grouped_product
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.inline_calls import inline_calls
from thesean.passes.graph.nodes import argument, is_write
from thesean.passes.graph.operators import names
from thesean.passes.graph.trace_call import is_composed, trace_call


def histogram(x: torch.Tensor, bins: int, least: float, most: float) -> torch.Tensor:
    """How many of x are in each of so many equal bins from `least` to `most`, which is in the last one. -> count_B."""
    x_N = x.flatten()
    bin_N = ((x_N - least) / (most - least) * bins).floor().clamp(max=bins - 1)
    hit_NB = bin_N.unsqueeze(1) == torch.arange(bins, dtype=x.dtype, device=x.device)
    inside_N = (x_N >= least) & (x_N <= most)
    return (hit_NB & inside_N.unsqueeze(1)).sum(0).to(x.dtype)


def _histc(x: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    if min >= max:
        raise NotImplementedError("its bounds are those of the values")
    return histogram(x, bins, min, max)


def _grouped_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    if (x.ndim, weight.ndim) != (2, 3) or offs is None or bias is not None:
        raise NotImplementedError("its groups are no rows")
    y = grouped_product(x, weight, offs)
    return y if out_dtype is None else y.to(out_dtype)


def _cosine_similarity(x: torch.Tensor, y: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    lengths = [v.square().sum(dim).sqrt().clamp_min(eps) for v in (x, y)]
    return (x * y).sum(dim) / (lengths[0] * lengths[1])


def _cdist(x: torch.Tensor, y: torch.Tensor, p: float = 2.0, compute_mode: int | None = None) -> torch.Tensor:
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)


def _largest(x: torch.Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> torch.Tensor:
    return x.amax(tuple(range(x.ndim)), keepdim)


def _least(x: torch.Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> torch.Tensor:
    return x.amin(tuple(range(x.ndim)), keepdim)


def _lstm_cell(
    x_BD: torch.Tensor, state: Sequence[torch.Tensor], w_in: Any, w_own: Any, b_in: Any = None, b_own: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_BE, cell_BE = state
    i, f, g, o = (linear(x_BD, w_in, b_in) + linear(hidden_BE, w_own, b_own)).chunk(4, 1)
    cell_BE = f.sigmoid() * cell_BE + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell_BE.tanh(), cell_BE


def _gru_cell(
    x_BD: torch.Tensor, hidden_BE: torch.Tensor, w_in: Any, w_own: Any, b_in: Any = None, b_own: Any = None
) -> torch.Tensor:
    given, own = linear(x_BD, w_in, b_in).chunk(3, 1), linear(hidden_BE, w_own, b_own).chunk(3, 1)
    reset, keep = ((a + b).sigmoid() for a, b in zip(given[:2], own[:2], strict=True))
    new_BE = (given[2] + reset * own[2]).tanh()
    return new_BE + keep * (hidden_BE - new_BE)


def _rnn_cell(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, hidden, w_in, w_own, b_in=None, b_own=None: activation(
        linear(x, w_in, b_in) + linear(hidden, w_own, b_own)
    )


def _embedding_bag(
    weight_VD: torch.Tensor,
    id_N: torch.Tensor,
    offset_B: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    *more: Any,
) -> tuple[torch.Tensor, ...]:
    """Sums, means or largest values (mode 0, 1, 2) of the rows of each bag, which are those from its offset to the
    next; zeros of one without rows. With `include_last_offset` no bag begins at the last one. What else torch
    returns is for its derivative.
    """
    rest: tuple[Any, ...] = (None, False, -1)
    share_N, include_last_offset, padding_idx = (*more, *rest[len(more) :])
    if scale_grad_by_freq:
        raise NotImplementedError("its derivative is another one")
    none_N = torch.cat([torch.zeros_like(id_N), torch.zeros_like(id_N[:1])])  # offsets may be behind the last row
    begun_N = none_N.to(torch.int64).scatter_add(0, offset_B.to(torch.int64), torch.ones_like(offset_B).to(torch.int64))
    bag_N = begun_N.cumsum(0)[:-1] - 1
    row_ND = torch.nn.functional.embedding(id_N, weight_VD)
    bag_ND = bag_N.unsqueeze(1).expand_as(row_ND)
    padding = -1 if padding_idx is None else padding_idx
    counts_N = torch.ones_like(id_N, dtype=torch.bool) if padding == -1 else id_N != padding
    # sizes aren't asked for: that of a range is a quotient
    zero_B = torch.zeros_like(offset_B).to(row_ND.dtype)
    zero_BD = zero_B.unsqueeze(1).repeat(1, row_ND.shape[1])
    if mode == 2:
        row_ND = row_ND.masked_fill(~counts_N.unsqueeze(1), -torch.inf)
        most_BD = (zero_BD - torch.inf).scatter_reduce(0, bag_ND, row_ND, "amax", include_self=True)
        bag_BD = torch.where(most_BD == -torch.inf, 0.0, most_BD)
    else:
        share_N = counts_N.to(row_ND.dtype) if share_N is None else share_N * counts_N
        bag_BD = zero_BD.scatter_add(0, bag_ND, row_ND * share_N.unsqueeze(1))
        if mode == 1:
            size_B = zero_B.scatter_add(0, bag_N, counts_N.to(row_ND.dtype))
            bag_BD = bag_BD / size_B.clamp_min(1).unsqueeze(1)
    return bag_BD[:-1] if include_last_offset else bag_BD, bag_N, bag_N, bag_N


# What torch can't trace, because a size in it hangs on a value, or makes of what writes into memory; and memory as it
# was found, which may hold zeros.
_FORMS: dict[str, Callable[..., Any]] = {
    "aten::histc": _histc,
    "aten::embedding_bag": _embedding_bag,
    "aten::_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
    "aten::empty": lambda *args, memory_format=None, **kwargs: torch.zeros(*args, **kwargs),
    "aten::empty_like": torch.zeros_like,
    "aten::new_empty": torch.Tensor.new_zeros,
    "aten::lstm_cell": _lstm_cell,
    "aten::gru_cell": _gru_cell,
    "aten::rnn_tanh_cell": _rnn_cell(torch.tanh),
    "aten::rnn_relu_cell": _rnn_cell(torch.relu),
    "aten::vdot": lambda x, y: (x.conj() * y if x.is_complex() else x * y).sum(),
    "aten::cosine_similarity": _cosine_similarity,
    "aten::cdist": _cdist,
    "aten::trace": lambda x: x.diagonal().sum(),
    "aten::copy": lambda x, source, non_blocking=False: source.to(x.dtype).expand(x.shape),
}
# Over all dimensions, which torch's exporter wants to be told.
_WHOLE: dict[Any, Callable[..., Any]] = {torch.ops.aten.amax.default: _largest, torch.ops.aten.amin.default: _least}
# What a file may hold, and has no derivative in torch.
_UNTRAINABLE = {torch.ops.aten.copy.default}


@dataclass(frozen=True)
class WriteOutOperators(Pass):
    """y = op(x)  =>  y = the operators that op is made of, where a file may hold those and not op itself.

    For torch.library.custom_op these are what its own function calls, on sizes alone; for torch's what torch makes of
    it. One stays that writes into its inputs, has a gradient of its own or goes another way at another value: saving
    says so.
    """

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        def made_of(node: fx.Node) -> fx.GraphModule | None:
            form = _form(node)
            return None if form is None else _traced(node, form)

        if not inline_calls(graph_module.graph, made_of):
            return PassResult.unchanged(graph_module, "no operator is to be written out")
        return PassResult(graph_module=graph_module, modified=True)


def _form(node: fx.Node) -> Callable[..., Any] | None:
    """A function that does the same by other operators."""
    target = node.target
    if target in _WHOLE and not argument(node, 1, "dim", ()):
        return _WHOLE[target]
    if (
        not isinstance(target, torch._ops.OpOverload)
        or (target in names() and target not in _UNTRAINABLE)
        or is_write(node)
    ):
        return None
    name = target._schema.name
    if name == "aten::embedding_bag" and any(user.args[1] != 0 for user in node.users if user.users):
        return None  # of what is for its derivative it reads more than the bags
    own = OPDEFS.get(name)
    return _FORMS.get(name) or (own._init_fn if own is not None and own._backward_fn is None else _torchs_own(target))


def _torchs_own(target: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """Itself, where torch makes it of other operators below its autograd."""
    return target if target.namespace == "aten" and is_composed(target) else None


def _traced(node: fx.Node, form: Callable[..., Any]) -> fx.GraphModule | None:
    """Its graph on the sizes of the node's inputs; its placeholders are those inputs, in order."""
    own = form is node.target
    table = {k: v for k, v in torch._decomp.decomposition_table.items() if k is form} if own else None
    with torch.enable_grad():
        made = trace_call(node, form, table, pre_dispatch=not own)
    if made is None:
        return None
    inner = [n for n in made.graph.nodes if n.op not in ("placeholder", "output")]
    plain = all(n.op == "call_function" and n.target in names() for n in inner)
    same = pytree.tree_structure(made.graph.output_node().args[0]) == pytree.tree_structure(node.meta.get("val"))
    return made if plain and same else None
