"""Which floating-point inputs are masks that are computed with, as in `scores + (1 - mask) * -1e4` or `mask * x`.

Integers and booleans carry no hidden state, so that nothing has to be asked of them. Floats may be anything: a mask
holds ones and zeros, or zeros and numbers that hide, and what is made of it alone meets hidden states element by
element, never a parameter.

B batch, T time
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.dataflow import is_size_only

aten = torch.ops.aten

# Below, exp is no normal number in float32, in which softmax is computed: -100 hides, as -1e4 does. A bias that guides
# compute themselves may be as low, where steps are far apart: of that `distance_bias.LOW` is asked.
HIDES = math.log(torch.finfo(torch.float32).tiny)

# what joins a mask with hidden states and leaves both what they are
_JOINS = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.minimum.default, aten.maximum.default,
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    aten.scaled_dot_product_attention.default, aten.matmul.default, aten.bmm.default,
}  # fmt: skip


def is_mask_of_floats(placeholder: fx.Node, example: torch.Tensor) -> bool:
    """Whether a floating-point input says which steps hold a token, by its example and by what is done with it."""
    if not example.is_floating_point() or example.ndim < 2 or not example.numel():
        return False
    flat = example.ndim == 2 or (example.ndim == 3 and example.shape[2] == 1)
    flags = flat and bool(((example == 0) | (example == 1)).all())
    adds = hides_by_adding(example) and bool(example.any())
    return (flags or adds) and _meets_states_alone(placeholder)


def hides_by_adding(value: torch.Tensor) -> bool:
    """Whether floats are zeros, and numbers that hide where they are added to scores."""
    return value.is_floating_point() and bool(((value == 0) | (value < HIDES)).all())


def _meets_states_alone(placeholder: fx.Node) -> bool:
    """What is made of an input and of sizes alone meets a value of another input, and no parameter."""
    made, front, meets = {placeholder}, [placeholder], False
    while front:
        for user in front.pop().users:
            if user in made or not isinstance(user.meta.get("val"), torch.Tensor):  # sizes carry no values
                continue
            others = [i for i in user.all_input_nodes if i not in made]
            if any(_is_table(i) for i in others):
                return False
            if any(_is_float(i) and not _is_of_sizes(i) for i in others):
                if user.target not in _JOINS:
                    return False
                meets = True
            else:
                made.add(user)
                front.append(user)
    return meets


def _is_float(node: fx.Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_table(node: fx.Node) -> bool:
    """Numbers of the guide's own, more than one."""
    return (node.op == "get_attr" or "constant" in node.meta) and _is_float(node) and node.meta["val"].numel() > 1


def _is_of_sizes(node: fx.Node) -> bool:
    """No input's values flow in: a number as a tensor, a causal half."""
    front, seen = [node], {node}
    while front:
        current = front.pop()
        if current.op == "placeholder":
            return False
        read = [] if is_size_only(current) else [i for i in current.all_input_nodes if i not in seen]
        front.extend(read)
        seen.update(read)
    return True
