"""What is said of an operator on the meta device is what it gives on the CPU, and it refuses what the CPU refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from thesean.passes.graph.shapes import Shapes

aten = torch.ops.aten

F32, F16, F64, I64, I32 = torch.float32, torch.float16, torch.float64, torch.int64, torch.int32


def t(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def told(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes by the rules."""
    given = pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
    with Shapes():
        found = pytree.tree_leaves(target(*given[0], **given[1]))
    assert all(x.is_meta for x in found)
    return [(tuple(x.shape), x.dtype) for x in found]


NONE: dict[str, Any] = {}
META = {"device": "meta"}  # where there is no tensor to tell it by

FITTING: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.cat.default, ([t(2, 3), t(2, 4)], 1), NONE),
    (aten.cat.default, ([t(2, 3), t(0), t(5, 3)],), NONE),
    (aten.cat.default, ([t(0), t(0)],), NONE),
    (aten.cat.default, ([t(2, 3, dtype=F16), t(2, 1)], -1), NONE),
    (aten.cat.default, ([t(3, dtype=I64), t(2, dtype=I32)],), NONE),
    (aten.addmm.default, (t(5), t(2, 3), t(3, 5)), NONE),
    (aten.addmm.default, (t(2, 1), t(2, 3), t(3, 5)), {"beta": 2, "alpha": 3}),
    (aten.native_layer_norm.default, (t(2, 3, 4), [4], t(4), t(4), 1e-5), NONE),
    (aten.native_layer_norm.default, (t(2, 3, 4), [3, 4], None, None, 1e-5), NONE),
    (aten.native_layer_norm.default, (t(2, 3), [3], t(3), None, 1e-5), NONE),
    (aten.native_layer_norm.default, (t(4), [4], t(4), t(4), 1e-5), NONE),
    (aten.stack.default, ([t(2, 3), t(2, 3)],), NONE),
    (aten.stack.default, ([t(2, 3), t(2, 3), t(2, 3, dtype=F64)], -1), NONE),
    (aten.stack.default, ([t(2, 3)], 1), NONE),
    (aten.native_group_norm.default, (t(2, 6, 5), t(6), None, 2, 6, 5, 3, 1e-5), NONE),
    (aten.native_group_norm.default, (t(2, 6, 5), None, None, 2, 6, 5, 1, 1e-5), NONE),
    (aten.cumsum.default, (t(2, 3, dtype=torch.bool), 1), NONE),
    (aten.cumsum.default, (torch.tensor(2.0), 0), {"dtype": F64}),
    (aten.cumsum.default, (t(2, 3), -2), NONE),
    (aten._safe_softmax.default, (t(2, 3), -1), NONE),
    (aten._softmax.default, (t(2, 3), 1, False), NONE),
    (aten.tril.default, (t(4, 3, dtype=torch.bool),), NONE),
    (aten.tril.default, (t(2, 4, 3, dtype=I64), -1), NONE),
    (aten.native_batch_norm.default, (t(4, 3, 2), t(3), t(3), t(3), t(3), False, 0.1, 1e-5), NONE),
    (aten.native_batch_norm.default, (t(4, 3), None, t(3), t(3), t(3), True, 0.1, 1e-5), NONE),
    (aten.linalg_vector_norm.default, (t(2, 3, 4), 2, [1]), NONE),
    (aten.linalg_vector_norm.default, (t(2, 3, 4), 1, [-1], True), NONE),
    (aten.linalg_vector_norm.default, (t(2, 3),), {"dtype": F64}),
    (aten.roll.default, (t(2, 3), [1], [1]), NONE),
    (aten.arange.default, (7,), NONE),
    (aten.arange.default, (2.5,), NONE),
    (aten.arange.default, (0.5,), NONE),
    (aten.arange.start, (4, 4), NONE),
    (aten.arange.default, (3,), {"dtype": I32}),
    (aten.arange.start, (2, 7), NONE),
    (aten.arange.start_step, (1, 8, 3), NONE),
    (aten.arange.start_step, (8, 1, -2), NONE),
    (aten.arange.start_step, (0, 1, 0.25), NONE),
    (aten.zeros_like.default, (t(2, 3),), {"dtype": torch.bool}),
    (aten.zeros_like.default, (t(2, dtype=F16),), NONE),
    (aten.mm.default, (t(2, 3), t(3, 5)), NONE),
    (aten.bmm.default, (t(2, 3, 4, dtype=F64), t(2, 4, 1, dtype=F64)), NONE),
    (aten.repeat.default, (t(2, 3), [4, 2]), NONE),
    (aten.repeat.default, (t(2, 3), [5, 1, 2]), NONE),
    (aten.repeat.default, (t(2, 3), [0, 2]), NONE),
    (aten.repeat.default, (torch.tensor(2.0), []), NONE),
    (aten.cat.default, ([t(0, 3), t(2, 3)],), NONE),
    (aten.addmm.default, (t(1), t(2, 3), t(3, 1)), NONE),
    (aten.embedding.default, (t(7, 4, dtype=F16), t(2, 3, dtype=I64)), NONE),
    (aten.embedding.default, (t(7, 4), t(3, dtype=I32)), NONE),
    (aten.flip.default, (t(2, 3), [1, -2]), NONE),
    (aten.amax.default, (t(2, 3, dtype=I64), [1], True), NONE),
    (aten.amax.default, (t(2, 3),), NONE),
    (aten.mean.dim, (t(2, 3, 4), [0, -1]), NONE),
    (aten.mean.dim, (t(2, 3), [1], True), {"dtype": F64}),
    (aten.mean.dim, (t(2, 3), None), NONE),
    (aten.sum.dim_IntList, (t(2, 3, dtype=torch.bool), [0]), NONE),
    (aten.sum.dim_IntList, (t(2, 3, 4), [-2], True), NONE),
    (aten.linspace.default, (0, 1, 5), NONE),
    (aten.logspace.default, (0, 1, 4), {"dtype": F64}),
    (aten.eye.default, (3,), NONE),
    (aten.eye.m, (3, 5), {"dtype": torch.bool}),
    (aten.polar.default, (t(2, 1), t(2, 3)), NONE),
    (aten.add.Tensor, (t(2, 1, 3), t(4, 1)), NONE),
    (aten.add.Tensor, (t(2, dtype=I64), 2.5), NONE),
    (aten.mul.Tensor, (t(2, 3, dtype=F16), torch.tensor(2.0)), NONE),
    (aten.gt.Scalar, (t(2, 3), 0), NONE),
    (aten.where.self, (t(2, 1, dtype=torch.bool), t(1, 3), t(1)), NONE),
    (aten.add_.Tensor, (t(2, 3), t(3)), NONE),
    (aten.fill_.Scalar, (t(2, 3), 1.0), NONE),
]  # fmt: skip


@pytest.mark.parametrize(("target", "args", "kwargs"), FITTING, ids=lambda v: str(v) if hasattr(v, "_schema") else "")
def test_a_shape_and_dtype_are_what_the_operator_gives(target, args, kwargs):
    wanted = [(tuple(x.shape), x.dtype) for x in pytree.tree_leaves(target(*args, **kwargs))]
    has_tensors = any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(args))
    assert told(target, args, kwargs if has_tensors else {**kwargs, **META}) == wanted


def test_a_write_gives_back_what_it_wrote_into_and_numbers_stay_numbers():
    x = torch.empty(2, 3, device="meta")
    with Shapes():
        for made in (aten.normal_.default(x), aten.zero_.default(x), aten.mul_.Tensor(x, torch.ones(3, device="meta"))):
            assert made is x
        assert aten.mul.Tensor(torch.tensor(3), torch.tensor(4)).item() == 12  # as sizes in tensors are
        assert aten.mul.Tensor(x, torch.tensor(4)).is_meta


MISFITS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.cat.default, ([t(2, 3), t(2, 4)], 0)),
    (aten.cat.default, ([t(2, 3), t(2, 3)], 2)),
    (aten.cat.default, ([t(2, 3), t(2, 3)], -3)),
    (aten.cat.default, ([t(2, 3), t(2, 3, 1)], 0)),
    (aten.addmm.default, (t(5), t(2, 3), t(4, 5))),
    (aten.addmm.default, (t(4), t(2, 3), t(3, 5))),
    (aten.addmm.default, (t(5), t(2, 3), t(1, 3, 5))),
    (aten.addmm.default, (t(5), t(1, 2, 3), t(3, 5))),
    (aten.native_layer_norm.default, (t(2, 3), [2], None, None, 1e-5)),
    (aten.native_layer_norm.default, (t(2, 3), [3], t(2), t(3), 1e-5)),
    (aten.native_layer_norm.default, (t(2, 3), [3], t(3), t(1), 1e-5)),
    (aten.native_layer_norm.default, (t(2, 3), [], None, None, 1e-5)),
    (aten.native_layer_norm.default, (t(3), [2, 3], None, None, 1e-5)),
    (aten.stack.default, ([t(2, 3), t(2, 4)],)),
    (aten.stack.default, ([t(2, 3), t(2, 3)], 3)),
    (aten.native_group_norm.default, (t(2, 6, 5), t(6), t(5), 2, 6, 5, 3, 1e-5)),
    (aten.native_group_norm.default, (t(2, 6, 5), t(1), None, 2, 6, 5, 3, 1e-5)),
    (aten.native_group_norm.default, (t(2, 6, 5), t(6), None, 2, 6, 5, 4, 1e-5)),
    (aten.native_group_norm.default, (t(2, 6, 5), t(6), None, 2, 6, 4, 3, 1e-5)),
    (aten.arange.start, (7, 2)),
    (aten.arange.start_step, (0, 4, 0)),
    (aten.arange.start_step, (0, 4, -1)),
    (aten.arange.default, (float("inf"),)),
    (aten.arange.default, (float("nan"),)),
    (aten.mm.default, (t(2, 3), t(4, 5))),
    (aten.mm.default, (t(1, 2, 3), t(1, 3, 5))),
    (aten.bmm.default, (t(2, 3, 4), t(3, 4, 5))),
    (aten.bmm.default, (t(3, 4), t(4, 5))),
    (aten.repeat.default, (t(2, 3), [4])),
    (aten.repeat.default, (t(2, 3), [1, -1])),
    (aten.embedding.default, (t(7, 4), t(3))),
    (aten.embedding.default, (t(7), t(3, dtype=I64))),
    (aten.flip.default, (t(2, 3), [2])),
    (aten._softmax.default, (t(2, 3), 2, False)),
    (aten.cumsum.default, (t(2, 3), 2)),
    (aten.sum.dim_IntList, (t(2, 3), [2])),
    (aten.amax.default, (t(2, 3), [-3])),
    (aten.add.Tensor, (t(2, 3), t(2))),
    (aten.add_.Tensor, (t(1, 3), t(2, 3))),
    (aten.mul.Tensor, (t(2, 3), t(4, 1, 2))),
]  # fmt: skip


@pytest.mark.parametrize(("target", "args"), MISFITS, ids=lambda v: str(v) if hasattr(v, "_schema") else "")
def test_what_the_operator_refuses_is_refused(target, args):
    with pytest.raises((RuntimeError, IndexError)):
        target(*args)
    has_tensors = any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(args))
    with pytest.raises((RuntimeError, IndexError)):
        told(target, args, {} if has_tensors else META)


@pytest.mark.parametrize(
    "given",
    [
        (t(2), t(3), t(3), t(3), False),
        (t(3), t(1), t(3), t(3), True),
        (t(3), t(3), t(4), t(3), True),
        (t(3), t(3), t(3), t(4), False),
        (None, None, t(2), t(3), False),
    ],
)
def test_a_batch_norm_reads_no_channel_that_is_not_there(given):
    """torch's own native one doesn't look."""
    with pytest.raises(RuntimeError, match="batch_norm scales otherwise"):
        told(aten.native_batch_norm.default, (t(4, 3), *given, 0.1, 1e-5), {})


def test_a_batch_norm_has_channels():
    with pytest.raises(RuntimeError, match="batch_norm scales otherwise"):
        told(aten.native_batch_norm.default, (t(3), None, None, None, None, True, 0.1, 1e-5), {})
