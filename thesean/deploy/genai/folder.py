"""A folder that onnxruntime-genai loads: model.onnx, genai_config.json and, where one is given, the tokenizer.

B batch, T time
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from thesean.deploy.export_report import ExportReport
from thesean.deploy.genai.states import POSITIONS, Caches, rename_states
from thesean.deploy.loaded import require
from thesean.deploy.lowering.to_onnx import output_names
from thesean.deploy.onnx_file import PARITY_SEEN, ROWS, STATES, draft
from thesean.deploy.parity import Check, CheckSizes
from thesean.deploy.relative_error import relative_error
from thesean.deploy.tokenizer import TOKENIZER_FILES, copy_tokenizer
from thesean.errors import ExportError, MissingExtraError, WriteError, first_line
from thesean.passes.analyse.positions import table_rows
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.resample import is_mask
from thesean.passes.graph.signature import InputSpec, Signature
from thesean.replace_folder import replacing
from thesean.scratch import named, telling

MODEL, CONFIG = "model.onnx", "genai_config.json"

# Where nothing bounds how far a network reads, genai still wants a number: it keeps so many token ids a row.
_ENDLESS = 2**17

# genai wants a token that ends a text, and takes this one where none is told.
_FIRST = 0

_UNMASKED = (
    "the guide was captured without a mask of tokens: the prompts of a batch have to be equally long, or give one "
    "among the example inputs"
)

_LABEL = "onnxruntime-genai vs torch"
_CHUNKS = (1, 5, 1, 1, 3)  # what follows a prompt
_PROMPT = 6
_PADDED = 2  # tokens that the shorter prompt of a batch has less


@dataclass(frozen=True, kw_only=True)
class Served:
    """A network that genai is to serve, and which of its inputs and outputs are what."""

    module: fx.GraphModule
    signature: Signature
    tokens: InputSpec
    mask: InputSpec | None
    logits: str
    words: int

    @classmethod
    def of(cls, module: fx.GraphModule, signature: Signature) -> Served:
        """Raises ExportError for anything but a causal language model: ids_BT, and maybe a mask, -> logits_BTV."""
        by_token = [s for s in signature.inputs if len(s.shape) == 2 and all(isinstance(d, str) for d in s.shape)]
        masks = [s for s in by_token if s.mask or (s.high is None and s.example is not None and is_mask(s.example))]
        tokens = [s for s in by_token if s.high is not None and s.name != POSITIONS]
        filled = {s.name for s in (*masks[:1], *tokens[:1])} | {POSITIONS}
        if other := next((s for s in signature.inputs if s.name not in filled), None):
            raise _unfit(f"input {other.name!r} of shape {list(other.shape)}", "token ids, and at most a mask of them")
        if not tokens:
            raise _unfit("no input of token ids", "one that indexes a table of words")
        names = output_names(module)
        logits = "logits" if "logits" in names else names[0]
        sizes = CheckSizes(batch=2, length=3).within(signature)
        with torch.no_grad():
            device = next((str(p.device) for p in module.parameters()), "cpu")
            inputs = signature.random_inputs(sizes.of(signature), device=device)
            found = leaf_values(module(**inputs))[names.index(logits)]
        if found.ndim != 3 or tuple(found.shape[:2]) != sizes.shape or not found.is_floating_point():
            raise _unfit(
                f"output {logits!r} of shape {list(found.shape)}", "logits of each token, (batch, time, words)"
            )
        return cls(
            module=module,
            signature=signature,
            tokens=tokens[0],
            mask=masks[0] if masks else None,
            logits=logits,
            words=found.shape[2],
        )

    @torch.no_grad()
    def run(self, ids_BT: torch.Tensor, padded: int = 0) -> np.ndarray:
        """logits_BTV of the whole in torch, of the last row without its first `padded` tokens."""
        inputs = {self.tokens.name: ids_BT.to(self.tokens.dtype)}
        shown_BT = torch.ones(ids_BT.shape, dtype=torch.int64)
        shown_BT[-1, :padded] = 0
        if self.mask is not None:
            inputs[self.mask.name] = shown_BT.to(self.mask.dtype)
        if any(s.name == POSITIONS for s in self.signature.inputs):
            inputs[POSITIONS] = (shown_BT.cumsum(1) - 1).clamp_min(0)
        found: np.ndarray = leaf_values(self.module(**inputs))[output_names(self.module).index(self.logits)].numpy()
        return found


def _unfit(found: str, expected: str) -> ExportError:
    return ExportError(
        f"genai: onnxruntime-genai serves causal language models alone: expected {expected}, found {found}. "
        "Use runtime='onnxruntime'."
    )


def write_genai(
    write: Callable[..., ExportReport], served: Served, folder: Path, tokenizer: Any = None
) -> ExportReport:
    """Fill `folder`; an earlier one of it is replaced in one step, once onnxruntime-genai gave the module's numbers.

    `write` exports the network with its state to a path, compared in onnxruntime. Raises ExportError, WriteError and
    MissingExtraError.
    """
    require("onnx", "onnxruntime", "onnxscript")
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MissingExtraError("onnxruntime-genai", "genai")
    start = time.monotonic()
    folder = named(folder)
    if folder.is_file():
        raise ExportError(f"{folder} is a file; runtime='genai' makes a folder. Give another name.")
    with telling(folder), replacing(folder, _ours(tokenizer is not None)) as made:
        special = copy_tokenizer(tokenizer, made, served.words)
        with _named_as(made / MODEL, folder):
            report = write(made / MODEL)
        if not report.stateful or report.delay:
            raise ExportError(
                f"genai: expected a state in and out, {report.note or f'found outputs {report.delay} steps late'}: "
                "onnxruntime-genai decodes step by step. Use runtime='onnxruntime'."
            )
        with _named_as(made / MODEL, folder):
            config, inputs, outputs = _rewrite(made / MODEL, served, report, special)
        (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        checks = _compare(made, served, folder, report.tolerance, config["model"]["pad_token_id"])
        told = [] if "eos_token_id" in special else [f"no tokenizer says what ends a text: {CONFIG} has token {_FIRST}"]
        told += [_UNMASKED] if served.mask is None else []
        size = sum(path.stat().st_size for path in made.iterdir())
    return replace(
        report,
        path=folder,
        bytes=size,
        inputs=inputs,
        outputs=outputs,
        note="; ".join(n for n in (report.note, *told) if n),
        checks=(*report.checks, *checks),
        seconds=time.monotonic() - start,
        weights=None,
    )


@contextmanager
def _named_as(path: Path, folder: Path) -> Iterator[None]:
    """Errors tell of the folder, not of a path that the caller never named."""
    try:
        yield
    except (ExportError, WriteError) as error:
        raise type(error)(str(error).replace(str(path), str(folder))) from error


class _Patterns(frozenset[str]):
    """The names that any of its patterns fits."""

    def __contains__(self, name: object) -> bool:
        return any(fnmatchcase(str(name), pattern) for pattern in self)


def _ours(tokenizer: bool) -> _Patterns:
    """What an export replaces of an earlier folder; what else people keep there stays."""
    return _Patterns((MODEL, CONFIG, f"{MODEL}.*.weights", *(TOKENIZER_FILES if tokenizer else ())))


def _rewrite(
    path: Path, served: Served, report: ExportReport, special: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """The model with genai's names, in the file's place -> the configuration that tells them, and the names of inputs
    and outputs."""
    import onnx_ir as ir

    model = ir.load(path)
    beside = report.weights is not None
    mask, pad = None if served.mask is None else served.mask.name, _pad(special)
    caches = rename_states(model, served.tokens.name, mask, pad)
    for told in (STATES, ROWS, PARITY_SEEN):  # of a file with other names
        model.metadata_props.pop(told, None)
    inputs, outputs = (tuple(str(v.name) for v in values) for values in (model.graph.inputs, model.graph.outputs))
    config = _config(served, caches, special)
    with draft(path) as drafted:
        drafted.write(model, True if beside else None)
        drafted.publish()
    return config, inputs, outputs


def _config(served: Served, caches: Caches, special: Mapping[str, Any]) -> dict[str, Any]:
    """genai_config.json, as config.cpp reads it."""
    inputs = {"input_ids": served.tokens.name}
    if served.mask is not None:
        inputs["attention_mask"] = served.mask.name
    inputs |= {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    length = table_rows(served.module) or _ENDLESS
    return {
        "model": {
            "type": "decoder",
            "vocab_size": served.words,
            "context_length": length,
            "eos_token_id": _FIRST,
            **special,
            "pad_token_id": _pad(special),
            "decoder": {
                "filename": MODEL,
                "num_hidden_layers": max(1, caches.layers),
                "num_attention_heads": caches.heads,
                "num_key_value_heads": caches.heads,
                "head_size": caches.width,
                "inputs": inputs,
                "outputs": {
                    "logits": served.logits,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # a cache grows by what was read: its buffers can't be those of what comes out
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }


def _pad(special: Mapping[str, Any]) -> int:
    """The token that pads, by default the first of those that end a text."""
    ids = special.get("pad_token_id", special.get("eos_token_id", _FIRST))
    return int(ids[0] if isinstance(ids, list) else ids)


def _compare(made: Path, served: Served, folder: Path, tolerance: float, pad: int) -> list[Check]:
    """A prompt and what follows it, one row in chunks and two with the tokens that they choose, against the whole in
    torch; where the network takes a mask, the second row's prompt is shorter and padded on the left.
    """
    checks = []
    for batch in (1, 2):
        prompt = _PROMPT + (sum(_CHUNKS) if batch == 1 else 0)
        inputs = served.signature.random_inputs(CheckSizes(batch=batch, length=prompt).of(served.signature), seed=3)
        ids_BT = inputs[served.tokens.name]
        ids_BT[ids_BT == pad] += -1 if pad else 1  # rows of a batch hide those
        padded = _PADDED if batch > 1 and served.mask is not None else 0
        ids_BT[-1, :padded] = pad
        try:
            ids_BT, found_BTV = _run(made, served, ids_BT)
        except RuntimeError as error:
            raise ExportError(f"{folder}: onnxruntime-genai does not run it: {first_line(error)}") from error
        whole_BTV = served.run(ids_BT, padded)
        found_BTV[-1, :padded] = whole_BTV[-1, :padded]  # what nothing is seen of has no one value
        off = relative_error(found_BTV, whole_BTV)
        if not off <= tolerance:
            raise ExportError(
                f"{folder}: {_LABEL} at {tuple(ids_BT.shape)}: expected an error of at most {tolerance:.0e} of the "
                f"output's scale, found {off:.1e}. No folder was written."
            )
        checks.append(Check(_LABEL, tuple(ids_BT.shape), off))
    return checks


def _run(made: Path, served: Served, ids_BT: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """All tokens and their logits_BTV, as genai itself carries the state: of several rows it takes a prompt alone, and
    goes on with the likeliest tokens.
    """
    import onnxruntime_genai as genai

    batch, prompt = ids_BT.shape
    model = genai.Model(str(made))
    params = genai.GeneratorParams(model)
    longest = prompt + len(_CHUNKS) + 1
    params.set_search_options(batch_size=batch, max_length=longest, do_sample=False)
    generator, found_BTV = genai.Generator(model, params), []
    lengths = (prompt - sum(_CHUNKS), *_CHUNKS) if batch == 1 else (prompt,)
    for chunk_BT in ids_BT.to(torch.int32).split(lengths, 1):
        generator.append_tokens(chunk_BT.numpy())
        found_BTV.append(np.array(generator.get_output(served.logits), np.float32))
    if batch > 1:
        generator.generate_next_token()  # of the logits that are there
        for _ in _CHUNKS:
            if generator.is_done():  # all rows have chosen to end
                break
            generator.generate_next_token()
            found_BTV.append(np.array(generator.get_output(served.logits), np.float32))
        rows = [torch.from_numpy(np.array(generator.get_sequence(row), np.int64)) for row in range(batch)]
        ids_BT = torch.stack(rows)[:, :-1]  # the last one was chosen and not read
    return ids_BT, np.concatenate(found_BTV, 1)
