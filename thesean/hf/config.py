"""config.json of a converted network: what of the guide's configuration others read, and which inputs are what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from thesean.hf.roles import Roles
from thesean.passes.analyse.positions import table_rows
from thesean.passes.graph.signature import Signature

TYPE = "thesean"

# Of the guide's, and true of the converted network still: sizes that tools ask for, tokens, names of classes.
_KEPT = (
    "vocab_size", "hidden_size", "max_position_embeddings", "n_positions", "bos_token_id", "eos_token_id",
    "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id", "id2label", "label2id", "num_labels",
    "problem_type",
)  # fmt: skip


class TheseanConfig(PreTrainedConfig):
    """`roles`: the names of the inputs that hold tokens, a mask of them, and positions, and of the output that holds
    logits. None of a network that isn't a causal language model. `licence`: of the guide, as it was given.
    `trained_further`: since the conversion, whose report tells nothing of that. The network itself stands in
    graph.json.
    """

    model_type = TYPE
    roles: dict[str, str | None] | None = None
    licence: str | None = None
    trained_further: bool = False
    use_cache: bool = True


def config_of(signature: Signature, network: Any, roles: Roles | None, dtype: Any) -> TheseanConfig:
    guide: Mapping[str, Any] = {} if signature.guide is None else signature.guide.config
    told = {key: guide[key] for key in _KEPT if guide.get(key) is not None}
    if isinstance(told.get("id2label"), Mapping):
        told["id2label"] = {int(k): v for k, v in told["id2label"].items()}
    if roles is not None:
        told["vocab_size"] = roles.words
        told["roles"] = roles.to_json()
    if "max_position_embeddings" not in told and (rows := table_rows(network)):
        told["max_position_embeddings"] = rows
    told["architectures"] = ["TheseanModel" if roles is None else "TheseanForCausalLM"]
    return TheseanConfig(**told, dtype=dtype, use_cache=roles is not None)
