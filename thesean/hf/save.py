"""What a converted model's own `save_pretrained` and `push_to_hub` do."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from thesean.artifact import EXAMPLE, NETWORK, Artifact
from thesean.errors import DataError
from thesean.hf.folder import Written, write_folder
from thesean.hf.follow import Place
from thesean.passes.graph.surgery import clone
from thesean.scratch import named
from thesean.warn import warn

# of other models' writers: shards and forms that a folder of ours doesn't have
_IDLE = (
    "safe_serialization", "max_shard_size", "variant", "save_peft_format", "save_original_format", "save_function",
    "distributed_checkpoint",
)  # fmt: skip
_LIKE_OURS = {
    "safe_serialization": True, "save_peft_format": True, "save_original_format": True, "distributed_checkpoint": False,
}  # fmt: skip


def save_model(model: PreTrainedModel, artifact: Artifact, folder: Any, **kwargs: Any) -> Path:
    """`state_dict`: other weights than the model's own. Raises DataError for unknown settings."""
    state, tokenizer = kwargs.pop("state_dict", None), kwargs.pop("tokenizer", None)
    push, repo_id, token = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None), kwargs.pop("token", None)
    idle = {key: kwargs.pop(key, None) for key in _IDLE}
    not_followed = [key for key, value in idle.items() if value is not None and value != _LIKE_OURS.get(key)]
    if unknown := next((k for k, v in kwargs.items() if v is not None), None):
        raise DataError(f"save_pretrained: expected no {unknown!r}: one folder is written, in one file of weights.")
    warn(f"save_pretrained: {key} is not followed: the weights are one model.safetensors." for key in not_followed)
    if state is not None and not isinstance(state, Mapping):
        raise DataError(f"state_dict: expected tensors by their names, found {type(state).__name__}.")
    if state is not None and any(state.get(k) is not v for k, v in model.state_dict().items()):
        artifact = _with(artifact, state)
    model.config.dtype = Place.of(model).dtype
    model.config.architectures = [type(model).__name__]
    generation = model.generation_config if model.can_generate() else None
    place = write_folder(
        Written(artifact=artifact, config=model.config, generation=generation, tokenizer=tokenizer), named(folder)
    )
    if push:
        push_folder(place, repo_id or place.name, token=token)
    return place


def push_model(model: PreTrainedModel, artifact: Artifact, repo_id: str, **kwargs: Any) -> Any:
    """A folder of its own, uploaded without the example: some rows of somebody's data."""
    tokenizer = kwargs.pop("tokenizer", None)
    with tempfile.TemporaryDirectory() as room:
        return push_folder(save_model(model, artifact, Path(room) / "model", tokenizer=tokenizer), repo_id, **kwargs)


def push_folder(folder: Path, repo_id: str, **kwargs: Any) -> Any:
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    private, message = kwargs.pop("private", None), kwargs.pop("commit_message", None)
    made = api.create_repo(repo_id, private=private, exist_ok=True)
    about = {k: v for k, v in kwargs.items() if k in ("revision", "create_pr", "commit_description") and v is not None}
    return api.upload_folder(
        repo_id=made.repo_id,
        folder_path=folder,
        commit_message=message or "Upload a converted network",
        ignore_patterns=[EXAMPLE],
        **about,
    )


def _of_names(error: RuntimeError) -> str:
    """Of torch's list of what is missing and what is too much, on one line."""
    return " ".join(str(error).partition(":\n")[2].split())[:300]


def _with(artifact: Artifact, state: Mapping[str, Any]) -> Artifact:
    """The network with these weights. Raises DataError for those of another network."""
    network = clone(artifact.graph_module)
    try:
        network.load_state_dict({key.removeprefix(NETWORK): value for key, value in state.items()})
    except RuntimeError as error:
        raise DataError(f"state_dict: these are not this network's weights: {_of_names(error)}") from error
    return replace(artifact, graph_module=network)
