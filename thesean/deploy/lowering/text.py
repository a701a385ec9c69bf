"""Functions of an ONNX model as text: lines in the syntax of ONNX, and a branch of their own for one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

END = 2**63 - 1


class Text:
    """Lines of a graph; constants are written where they are first used."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.lines = prefix, list[str]()
        self._known: dict[str, str] = {}

    def ints(self, *numbers: int) -> str:
        return self.constant(f"value_ints = [{', '.join(map(str, numbers))}]")

    def floats(self, *numbers: float) -> str:
        return self.constant(f"value_floats = [{', '.join(f'{float(n)!r}' for n in numbers)}]")

    def number(self, number: float) -> str:
        return self.constant(f"value_float = {float(number)!r}")

    def constant(self, text: str) -> str:
        if text not in self._known:
            self._known[text] = f"{self.prefix}_c{len(self._known)}"
            self.lines.append(f"{self._known[text]} = Constant <{text}> ()")
        return self._known[text]

    def __call__(self, made: str, kind: str, *inputs: str, **attributes: Any) -> str:
        """`made` = kind <attributes> (inputs); the names that it makes."""
        told = ", ".join(
            f"{k} = {v}" if not isinstance(v, Reference) else f"{k}: float = {v}" for k, v in attributes.items()
        )
        self.lines.append(f"{made} = {kind} {f'<{told}> ' if told else ''}({', '.join(inputs)})")
        return made

    def reshape(self, made: str, x: str, *sizes: int) -> str:
        return self(made, "Reshape", x, self.ints(*sizes))

    def split(self, made: tuple[str, ...], x: str, sizes: tuple[int, ...], axis: int) -> tuple[str, ...]:
        """Parts of size 0 are left out."""
        kept = [(n, s) for n, s in zip(made, sizes, strict=True) if s]
        if len(kept) == 1:
            self(kept[0][0], "Identity", x)
        else:
            self(", ".join(n for n, _ in kept), "Split", x, self.ints(*(s for _, s in kept)), axis=axis)
        return made

    def slice(self, made: str, x: str, start: int, end: int, axis: int) -> str:
        return self.cut(made, x, (start, end, axis))

    def cut(self, made: str, x: str, *cuts: tuple[int, int, int]) -> str:
        """A slice of several axes: start, end and axis of each."""
        return self(made, "Slice", x, *(self.ints(*numbers) for numbers in zip(*cuts, strict=True)))


class Reference(str):
    """An attribute of the function, as one of a node."""


def choose(made: Sequence[str], condition: str, told: Sequence[str], bodies: dict[str, list[str]]) -> str:
    """A line: `made` are what the first body computes where the condition is true, and the second where it isn't.
    `told` has type and shape of each, "float[B, T] y", which a body calls by its own name: y_step of "step".
    """
    branch = [
        f"{end} () => ({', '.join(f'{one}_{end}' for one in told)})\n    {{\n"
        + "\n".join(f"        {line}" for line in body)
        + "\n    }"
        for end, body in bodies.items()
    ]
    return f"{', '.join(made)} = If ({condition}) <then_branch = {branch[0]}, else_branch = {branch[1]}>"


def branches(
    name: str, given: Sequence[str], told: Sequence[str], bodies: tuple[list[str], list[str]], attributes: str = ""
) -> str:
    """A function of the model, but for its opsets: `told`, as of `choose`, of what the first body computes where the
    input "is_step" is true, y_step, and the second where it isn't, y_chunk.
    """
    made = [f"next_{one.split()[-1]}" for one in told]
    return f"""{name} {attributes}({", ".join([*given, "is_step"])}) => ({", ".join(made)})
{{
    {choose(made, "is_step", told, dict(zip(("step", "chunk"), bodies, strict=True)))}
}}
"""


def tell_steps(model: Any, calls: Sequence[Any]) -> None:
    """Whether there is one step, found out once for all calls of a length, as their last input: is_step."""
    import onnx_ir as ir

    known = {value.name: value for node in model.graph for value in node.outputs}
    for call in calls:
        length = str(call.inputs[0].shape[1])
        if (name := f"is_step_{length}") not in known:
            one = ir.Value(name=f"one_step_{length}", const_value=ir.tensor([1]))
            one.shape, one.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
            model.graph.register_initializer(one)
            time = ir.node("Shape", [call.inputs[0]], {"start": 1, "end": 2})
            found = ir.node("Equal", [time.outputs[0], one])
            time.outputs[0].name, found.outputs[0].name = f"steps_{length}", name
            model.graph.insert_before(call, [time, found])
            known[name] = found.outputs[0]
        call.resize_inputs(len(call.inputs) + 1)
        call.replace_input_with(len(call.inputs) - 1, known[name])
