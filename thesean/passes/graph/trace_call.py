"""What torch makes of one call of an operator, or of another form of it, on tensors of its inputs' sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

logger = logging.getLogger(__name__)


# torch writes a page about each call that fails on sizes without a number, such as a pad by -1
_tracer = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def _unheard() -> Iterator[None]:
    level = _tracer.level
    _tracer.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        _tracer.setLevel(level)


def is_composed(target: torch._ops.OpOverload) -> bool:
    """Whether torch makes it of other operators below its autograd."""
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return composite or target in torch._decomp.decomposition_table


def trace_call(
    node: fx.Node,
    form: Callable[..., Any],
    table: Mapping[Any, Any] | None = None,
    pre_dispatch: bool = False,
    as_example: bool = False,
) -> fx.GraphModule | None:
    """The graph of `form` called as the node calls its operator, taken apart by `table`; its placeholders are the
    node's inputs, in order. None where torch can't. Nothing is computed, and of the sizes that the node's graph has as
    symbols nothing is concluded: they stay free there. `as_example`: with the example's numbers for these, as some of
    torch's forms want.
    """
    inputs = node.all_input_nodes
    values = [i.meta.get("val") for i in inputs]
    if as_example:
        values = [_of_numbers(v) if isinstance(v, torch.Tensor) else v for v in values]
    mode = detect_fake_mode(values) or FakeTensorMode()
    given = [v if isinstance(v, FakeTensor) or not isinstance(v, torch.Tensor) else mode.from_tensor(v) for v in values]

    def of_inputs(*values: Any) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), dict(zip(inputs, values, strict=True)).__getitem__)
        return form(*args, **kwargs)

    try:
        with mode, _unheard(), nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards():
            made = make_fx(of_inputs, None if table is None else dict(table), pre_dispatch=pre_dispatch)(*given)
    except Exception as error:  # the tracer raises whatever it meets
        logger.debug("%s can't be traced by itself: %s", node.target, error)
        return None
    assert isinstance(made, fx.GraphModule)
    return made


def _of_numbers(value: torch.Tensor) -> torch.Tensor:
    """One like it, whose sizes are the example's."""
    sizes, strides = (
        [int(n.node.hint) if isinstance(n, torch.SymInt) else n for n in numbers]
        for numbers in (value.shape, value.stride())
    )
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
