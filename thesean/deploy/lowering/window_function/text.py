"""Lines in the syntax of ONNX."""

from __future__ import annotations

from typing import Any

from thesean.deploy.lowering.window_function.shape import Shape

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
        return self(made, "Slice", x, self.ints(start), self.ints(end), self.ints(axis))


class Reference(str):
    """An attribute of the function, as one of a node."""


def partner(t: Text, name: str, x: str, s: Shape) -> str:
    """Each feature's partner in its place."""
    if not s.runs:
        return t(name, "Gather", x, "partner_C", axis=-1)
    ordered = sorted(s.runs)
    parts = {run: f"{name}_{run[0]}" for run in ordered}
    t.split(tuple(parts[run] for run in ordered), x, tuple(end - start for start, end in ordered), -1)
    return t(name, "Concat", *(parts[run] for run in s.runs), axis=-1)


def turn(t: Text, name: str, x: str, tables: tuple[str, str], s: Shape) -> str:
    cos, sin = tables
    t(f"{name}_cos", "Mul", x, cos)
    partner(t, f"{name}_partner", x, s)
    t(f"{name}_sin", "Mul", f"{name}_partner", sin)
    return t(f"{name}_turned", "Add", f"{name}_cos", f"{name}_sin")
