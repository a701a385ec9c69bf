"""Whether a network could be saved and loaded again, found before it is trained: all that both do but for the weights'
numbers, in memory.
"""

from __future__ import annotations

import json
import sys

from torch import fx

from thesean.artifact import described, examples_of, named_tensors
from thesean.load_artifact import Written, fitted, refusing
from thesean.passes.graph import graph_json
from thesean.passes.graph.signature import Signature
from thesean.passes.plan.plan import Plan


def check_loadable(graph_module: fx.GraphModule, signature: Signature, plan: Plan) -> None:
    """Raises ArtifactError for a network that `save` would refuse, or that `load` would: to be asked before training,
    which changes neither operators nor names nor shapes. Nothing is written, and no weight is read.
    """
    shapes, aliases = named_tensors(graph_module, bare=True)
    body = json.loads(json.dumps(described(graph_module, signature, aliases)))
    nodes = json.dumps(graph_json.dump(graph_module.graph))
    written = Written(
        body=body,
        graph=graph_json.load(json.loads(nodes)),
        examples=examples_of(signature),
        shapes=shapes,
        plan=plan,
        bytes=0,
    )
    with refusing("the conversion"):
        fitted(written, sys.maxsize, "the conversion")  # `load` is told how much it may take
