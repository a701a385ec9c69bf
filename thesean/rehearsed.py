"""What would fail once all is trained, found on the untrained hybrid."""

from __future__ import annotations

from functools import partial

from thesean import ranks
from thesean.deploy.rehearse import unstreamable, unwritable
from thesean.errors import ArtifactError
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid
from thesean.rehearse_artifact import check_loadable
from thesean.targets import TargetModule
from thesean.warn import warn
from thesean.workdir import Workdir


def rehearsed(bound_plan: BoundPlan, hybrid: Hybrid, run: Workdir | None) -> list[str]:
    """Why the untrained hybrid can't be saved, exported or streamed, for the report. Raises ArtifactError where it must
    be saved. Else that is a warning, as what can't be exported is: not everyone does either. Of modules of the caller's
    own the guide's page says so.
    """
    notes: list[str] = []
    signature = bound_plan.captured.signature
    try:
        check_loadable(hybrid.graph_module, signature, bound_plan.plan)
    except ArtifactError as error:
        if run is not None:
            raise
        notes.append(f"can't be saved: {error}")
        if not _has_own_modules(hybrid):
            warn(notes)
    if run is not None:
        ranks.first(partial(run.check_room, hybrid.graph_module))
    for told in filter(None, (unwritable(hybrid.graph_module), unstreamable(hybrid.graph_module, signature))):
        warn([told])
        notes.append(told)
    return notes


def _has_own_modules(hybrid: Hybrid) -> bool:
    graph_module = hybrid.graph_module
    called = graph_module.graph.find_nodes(op="call_module")
    return not all(isinstance(graph_module.get_submodule(str(n.target)), TargetModule) for n in called)
