"""An ONNX file in onnxruntime: named arrays in and out, the state beside.

B batch, T time, V vocabulary
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thesean.deploy.onnx_file import DELAY, check_weights, metadata
from thesean.errors import DataError, ExportError, MissingExtraError
from thesean.passes.thread_state import STATE_IN, STATE_OUT, state_shape

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}

Arrays = dict[str, np.ndarray]


def require(*packages: str) -> None:
    """Raises MissingExtraError for the first of the extra's packages that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "onnx")


class Session:
    """A thin wrapper of onnxruntime on CPU; `metadata` is what the file says of itself. Raises ExportError for a file
    that onnxruntime can't load, and for weights beside it that are missing or were changed.

    `delay`: how many steps late outputs come, where parts of the network look ahead; `flush` brings out the last ones.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        require("onnxruntime")
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised, not printed
        try:
            real = os.path.realpath(path)  # a link's target has its weights beside it, the link has not
            self._session = ort.InferenceSession(real, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            if importlib.util.find_spec("onnx") is not None and Path(path).is_file():
                check_weights(Path(real), metadata(Path(path)))
            raise ExportError(f"{path}: onnxruntime can't load it: {first_line(error)}") from error
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        check_weights(Path(real), self.metadata)
        self._declared: dict[str, Any] = {i.name: i for i in self._session.get_inputs()}
        names = [o.name for o in self._session.get_outputs()]
        self.states = tuple(n for n in self._declared if n.startswith(STATE_IN))
        self.inputs = tuple(n for n in self._declared if n not in self.states)
        self.outputs = tuple(n for n in names if not n.startswith(STATE_OUT))
        late = json.loads(self.metadata.get(DELAY, "{}"))
        self.delay, self._seen = int(late.get("steps", 0)), str(late.get("seen", ""))
        self._names = [*self.outputs, *(STATE_OUT + n.removeprefix(STATE_IN) for n in self.states)]

    @property
    def is_stateful(self) -> bool:
        """Whether the file takes states, so that a sequence can come in chunks."""
        return bool(self.states)

    def zero_state(self, batch: int) -> Arrays:
        """The states that start `batch` sequences, in the shapes that the file declares."""
        return {
            name: np.zeros(state_shape(self._declared[name].shape, batch, 0), _DTYPES[self._declared[name].type])
            for name in self.states
        }

    def run(self, inputs: Arrays, state: Arrays | None = None) -> tuple[Arrays, Arrays]:
        """(outputs, state after them); no state means a sequence's start. The state goes into the next call as it is.

        Of a file whose outputs are late every step holds a token, unless its input `seen` says otherwise. Raises
        DataError for inputs that the file doesn't take or that don't fit it.
        """
        if self._seen and self._seen not in inputs:
            first = next((np.asarray(inputs[n]) for n in self.inputs if n in inputs), None)
            if first is not None and first.ndim > 1:
                inputs = {**inputs, self._seen: np.ones(first.shape[:2], np.bool_)}
        missing = [n for n in self.inputs if n not in inputs]
        if missing:
            raise DataError(f"missing input {missing[0]!r}; the file takes: {', '.join(self.inputs)}.")
        given = {n: np.asarray(inputs[n], _DTYPES[self._declared[n].type]) for n in self.inputs}
        if self.states:
            first = next(iter(given.values()))
            given |= self.zero_state(first.shape[0]) if state is None else {n: state[n] for n in self.states}
        try:
            values = self._session.run(self._names, given)
        except Exception as error:
            raise DataError(f"onnxruntime refuses these inputs: {first_line(error)}") from error
        count = len(self.outputs)
        after = dict(zip(self.states, values[count:], strict=True))
        return dict(zip(self.outputs, values[:count], strict=True)), after

    def flush(self, inputs: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        """The last `delay` outputs of sequences that have ended, after a run that left `state`; `inputs` are any that
        the file takes, such as those of that run: their last step is repeated, and read as no token.
        """
        last = {n: np.repeat(np.asarray(inputs[n])[:, -1:], self.delay, 1) for n in self.inputs if n != self._seen}
        first = next(iter(last.values()))
        return self.run({**last, self._seen: np.zeros(first.shape[:2], np.bool_)}, state)

    def generate(self, prompt_ids: Sequence[int], count: int) -> list[int]:
        """`count` greedy tokens after the prompt: prefill once, then one token at a time with the state carried.

        A file without state reads everything again for each token. The first output is taken as logits_BTV. Raises
        DataError for an empty prompt, or a file that takes no tokens.
        """
        if not len(prompt_ids):
            raise DataError("the prompt is empty; expected at least one token.")
        integers = [n for n in self.inputs if "int" in self._declared[n].type]
        if not integers:
            raise DataError(f"the file takes no tokens; its inputs are: {', '.join(self.inputs)}.")
        chunk, everything = list(prompt_ids), list(prompt_ids)
        made: list[int] = []
        state: Arrays | None = None
        for _ in range(count):
            ids_BT = np.asarray([chunk if self.is_stateful else everything])
            # a second integer input is a mask: everything is visible
            feeds = {n: ids_BT if n == integers[0] else np.ones_like(ids_BT) for n in self.inputs}
            outputs, state = self.run(feeds, state)
            logits_BTV = outputs[self.outputs[0]]
            made.append(int(logits_BTV[0, -1].argmax()))
            everything.append(made[-1])
            chunk = [made[-1]]
        return made


def first_line(error: BaseException) -> str:
    """What an exception says, without its tail of advice for developers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
