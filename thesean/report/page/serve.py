"""How the file is served with numpy and onnxruntime alone, by its own names."""

from __future__ import annotations

from thesean.report.page.findings import Served
from thesean.report.page.markup import element, paragraph, words

Shape = tuple[int | str, ...]


def serve_section(served: Served) -> str:
    if served.states is None:
        told = "Written before a file was exported: names of states are the file's. html(..., onnx=FILE) tells them."
    elif served.states:
        told = "The file carries a state: give each step what the last one left, and only what is new."
    else:
        told = "The file carries no state."
    return paragraph(told, "quiet") + element("pre", element("code", words(program(served))), tabindex=0)


def program(served: Served) -> str:
    """Lines of Python that run it once, and once more where there is a state."""
    lines = ["import numpy as np", "import onnxruntime", ""]
    if served.states is None:
        lines.append(f"# converted.export({served.file!r}) writes it")
    lines.append(f"session = onnxruntime.InferenceSession({served.file!r})")
    lines += [
        "inputs = {",
        *(f"    {n!r}: {_filled(dtype, shape, n in served.masks)}," for n, dtype, shape in served.inputs),
        "}",
    ]
    if not served.states:
        return "\n".join([*lines, "outputs = session.run(None, inputs)"])
    lines += [
        "state = {",
        *(f"    {name!r}: {_filled(dtype, shape, state=True)}," for name, dtype, shape in served.states),
        "}",
    ]
    count = len(served.outputs)
    lines += [
        "found = session.run(None, inputs | state)",
        f"outputs, after = found[:{count}], found[{count}:]  # {', '.join(served.outputs)}; then the states",
        "state = dict(zip(state, after))  # of the next call",
    ]
    return "\n".join(lines)


def _filled(dtype: str, shape: Shape, ones: bool = False, state: bool = False) -> str:
    """One row, and of every other free dimension a few; a state that remembers steps begins with none."""
    sizes = [
        str(size) if isinstance(size, int) else "1" if str(size).startswith("batch") else "0" if state else "16"
        for size in shape
    ]
    return f"np.{'ones' if ones else 'zeros'}(({', '.join(sizes)}{',' if len(sizes) == 1 else ''}), np.{dtype})"
