"""Thesean: a compiler that changes a trained network's architecture.

converted = thesean.compile(model, target="rnn", data=batches)
converted.export("model.onnx")
"""

import importlib
from typing import TYPE_CHECKING, Any

from thesean.activations import save_activations
from thesean.answers import compare_answers
from thesean.choose.plans import Plans
from thesean.compare import compare
from thesean.compiler import baseline, compile, plan
from thesean.converted import Converted, load
from thesean.distill.losses import accuracy, cross_entropy, next_token
from thesean.errors import TheseanError
from thesean.export_guide import export_guide
from thesean.passes.plan.plan import Plan
from thesean.recipe import Recipe
from thesean.report.answers import Answers
from thesean.report.comparison import Comparison
from thesean.report.trade_offs import TradeOffs
from thesean.similarity import measures
from thesean.targets import Target, register
from thesean.trade_offs import trade_offs

if TYPE_CHECKING:  # a module that can be called is beyond a type checker
    from thesean.similarity import similarity
    from thesean.targets import targets
else:
    from thesean import similarity, targets

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "hf":  # brings transformers, and so is read when it is asked for
        return importlib.import_module("thesean.hf")
    raise AttributeError(f"module 'thesean' has no attribute {name!r}")


__all__ = [
    "Answers",
    "Comparison",
    "Converted",
    "Plan",
    "Plans",
    "Recipe",
    "Target",
    "TheseanError",
    "TradeOffs",
    "accuracy",
    "baseline",
    "compare",
    "compare_answers",
    "compile",
    "cross_entropy",
    "export_guide",
    "load",
    "measures",
    "next_token",
    "plan",
    "register",
    "save_activations",
    "similarity",
    "targets",
    "trade_offs",
]
