"""A converted network as a model of transformers.

B batch, T time, P steps that were read before, V vocabulary
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from thesean.artifact import NETWORK, Artifact
from thesean.deploy.lowering.to_onnx import output_names
from thesean.distill.recompute import Recomputing, Run
from thesean.errors import DataError
from thesean.hf.called import cast, check_mask, checked_ids, outputs_asked
from thesean.hf.config import TheseanConfig
from thesean.hf.follow import Following, constants_as_buffers
from thesean.hf.labels import check_steps, loss_of, telling
from thesean.hf.reading import Read, check_attention, read
from thesean.hf.roles import Roles
from thesean.hf.save import push_model, save_model
from thesean.hf.states import CarriedStates, carried
from thesean.hf.stream import Stream, stream_of
from thesean.passes.graph.modes import usual_settings
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.signature import Signature, output_wrapper
from thesean.passes.plan.plan import Plan
from thesean.recipe import Recipe
from thesean.report.conversion import ConversionReport
from thesean.targets.shared.steps import Steps

TYPES = "token_type_ids"  # tokenizers give zeros, or none, where a model is of one type of tokens


class NamedForward:
    """A model's forward that says what it takes: transformers' Trainer drops the columns that it doesn't."""

    def __init__(self, model: TheseanModel) -> None:
        self.model = model
        names = [*(spec.name for spec in model.signature.inputs), "labels"]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names])

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **inputs)


class TheseanModel(PreTrainedModel):
    """Any converted network: `forward` takes the guide's inputs by name, and gives an output of the guide's class.

    Made by `thesean.hf.from_pretrained` and `from_converted`: a configuration alone has no network in it.
    """

    config_class = TheseanConfig
    base_model_prefix = NETWORK.removesuffix(".")
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: TheseanConfig,
        network: fx.GraphModule | None = None,
        signature: Signature | None = None,
        plan: Plan | None = None,
        report: ConversionReport | None = None,
    ) -> None:
        if network is None or signature is None or plan is None or report is None:
            raise DataError(
                f"{type(self).__name__} can't be made of a configuration alone. Use thesean.hf.from_pretrained(folder) "
                "or thesean.hf.from_converted(converted)."
            )
        super().__init__(config)
        self.network = constants_as_buffers(network)
        self.signature, self.plan, self.report = signature, plan, report
        self.gradient_checkpointing = False  # transformers sets it
        self._recomputed: Run | None = None
        self.post_init()
        names = [name for name, _ in self.network.named_parameters(remove_duplicate=False)]
        kept = {name for name, _ in self.network.named_parameters()}
        self._keys_to_ignore_on_save = {NETWORK + name for name in names if name not in kept}  # tied: saved once
        if type(self).forward is TheseanModel.forward:
            self.forward = NamedForward(self)  # type: ignore[method-assign]

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Like the example that the guide was captured with, on this model's device."""
        sizes = {s: 2 if s.startswith("batch") else self.report.train_length or 8 for s in self.signature.symbols}
        sizes |= self.signature.example_sizes
        return self.signature.random_inputs(self.signature.within(sizes), device=str(self.device))

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        """The guide's output; with `labels` of rows its `loss` too, first: cross entropy of whole numbers, of floats
        what transformers' classifiers take, or the mean squared error. Raises DataError.
        """
        names = [*(spec.name for spec in self.signature.inputs), "labels"]
        if len(args) > len(names):
            raise DataError(f"expected at most {len(names)} inputs ({', '.join(names)}), found {len(args)}.")
        inputs |= dict(zip(names, args, strict=False))
        labels = inputs.pop("labels", labels)
        as_tuple = self._returns_tuples(inputs)
        given = self._given(inputs)
        with self._telling(given):
            output = output_wrapper(self.signature)(self._run(given))
        if labels is not None:
            logits = output.get("logits") if isinstance(output, dict) else None
            output = type(output)(**{"loss": self._loss(logits, labels), **output})  # the loss comes first
        return output.to_tuple() if as_tuple and isinstance(output, ModelOutput) else output

    def _returns_tuples(self, inputs: dict[str, Any]) -> bool:
        """Takes `return_dict` out of the arguments; its default is the configuration's."""
        asked = inputs.pop("return_dict", None)
        return not (self.config.return_dict if asked is None else asked)

    def _loss(self, logits: torch.Tensor | None, labels: Any) -> torch.Tensor:
        """transformers' own classifiers take floats for several classes at once."""
        floats = "regression" if self.signature.guide is None else "multi_label_classification"
        return loss_of(logits, labels, self.config.problem_type, floats)

    def _given(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the network takes of what it is called with. A mask that isn't given hides nothing."""
        given: dict[str, torch.Tensor] = {}
        left = {name: value for name, value in inputs.items() if value is not None}
        for name in ("use_cache", "num_items_in_batch", *outputs_asked(left)):
            left.pop(name, None)
        shape = next((v.shape[:2] for v in left.values() if isinstance(v, torch.Tensor) and v.ndim >= 2), None)
        for spec in self.signature.inputs:
            value = left.pop(spec.name, None)
            if value is None and (spec.name == "attention_mask" or spec.mask) and shape is not None:
                value = torch.ones(shape, dtype=spec.dtype, device=self.device)
            if value is None and spec.name == TYPES and shape is not None:
                value = torch.zeros(shape, dtype=spec.dtype, device=self.device)
            if value is None:
                raise DataError(f"missing input {spec.name!r}; expected: {spec.describe()}.")
            given[spec.name] = cast(value, spec)
        for name, value in left.items():
            if not (name == TYPES and isinstance(value, torch.Tensor) and not bool(value.any())):
                known = ", ".join(s.name for s in self.signature.inputs)
                raise DataError(f"unknown input {name!r}; the converted network takes: {known}.")
        self.signature.check(given)
        return given

    def _run(self, given: dict[str, torch.Tensor]) -> Any:
        """The network; with gradient checkpointing, what regions of it keep for the backward is computed anew there."""
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return self.network(**given)
        if self._recomputed is None:
            self._recomputed = Recomputing(Recipe(activation_checkpointing=True)).graph(self.network, ())
        return self._recomputed(**given)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recomputed": None}  # a copy trains its own weights

    @contextmanager
    def _telling(self, given: dict[str, torch.Tensor]) -> Iterator[None]:
        """DataError for ids that no table holds, where that is why a call fails."""
        try:
            yield
        except (IndexError, RuntimeError) as error:
            if why := self.signature.out_of_range(given):
                raise DataError(f"{why}.") from error
            raise

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """The graph's own constants go to the device and the precision that its weights go to."""
        self._recomputed = None  # weights and buffers may be others
        following = Following(self.network, self.signature, fn)
        super()._apply(fn, recurse)
        self.signature = following.finish()
        return self

    def enable_input_require_grads(self) -> None:
        """Nothing: a region that is computed anew needs no gradient of what it reads to have its weights'."""

    def init_weights(self) -> None:
        """Nothing: they are the conversion's, and transformers would draw others."""

    def train(self, mode: bool = True) -> Any:
        self.config.trained_further = self.config.trained_further or mode
        return super().train(mode)

    def get_input_embeddings(self) -> Any:
        raise NotImplementedError("a graph has tables, and no layer of its own for them.")  # as transformers asks for

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Raises DataError; a TheseanForCausalLM writes."""
        raise DataError(
            "generate: this conversion is no causal language model: ids, and maybe a mask, to logits of the next one. "
            "Of an encoder-decoder converted.export(path) writes files, and thesean.deploy.session.Session generates."
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Raises DataError."""
        raise DataError(
            "resize_token_embeddings: a graph has tables, and no layer of its own for them. Resize the guide's, and "
            "convert it then."
        )

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> str:
        """Any that computes the same; transformers asks each model which ones it has."""
        check_attention(attn_implementation)
        return "eager"

    @property
    def artifact(self) -> Artifact:
        """What a folder is written of."""
        return Artifact(graph_module=self.network, signature=self.signature, plan=self.plan, report=self.report)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """The folder that `from_pretrained` reads. Raises ArtifactError, WriteError."""
        if is_main_process:
            save_model(self, self.artifact, save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """To the Hub, with the card that `save_pretrained` writes."""
        return push_model(self, self.artifact, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `thesean.hf.from_pretrained`, as this class."""
        if args:
            raise DataError(f"from_pretrained: expected one folder, found {args[0]!r} after it.")
        found = read(pretrained_model_name_or_path, **kwargs)
        told: dict[str, Any] = {key: [] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
        model = cls.of(found)
        return (model, told) if found.wants_info else model

    @classmethod
    def of(cls, found: Read) -> Any:
        """The model that was read, in eval mode. Raises DataError where it isn't of this class."""
        if cls.can_generate() and found.config.roles is None:
            raise DataError("this conversion is no causal language model: load it with thesean.hf.from_pretrained.")
        converted = found.converted
        model = cls(found.config, converted.module, converted.signature, converted.plan, converted.report)
        model.name_or_path = found.name
        if found.generation is not None and cls.can_generate():
            model.generation_config = found.generation
        if found.dtype is not None:
            model.to(found.dtype)
        if found.device is not None:
            model.to(found.device)
        return model.eval()


class TheseanForSequenceClassification(TheseanModel):
    """A converted classifier, of rows, tokens or images: the same, known to transformers as one."""

    @classmethod
    def of(cls, found: Read) -> Any:
        if found.config.roles is not None:
            raise DataError("this conversion is a causal language model: load it with AutoModelForCausalLM.")
        if "logits" not in output_names(found.converted.module):
            raise DataError("this conversion has no output 'logits': load it with thesean.hf.from_pretrained.")
        return super().of(found)


class TheseanForCausalLM(TheseanModel, GenerationMixin):
    """A converted language model: `generate` decodes with the network's own states, recurrent ones and the keys and
    values of attentions that were kept, and reads no prefix again.
    """

    _is_stateful = True  # what was read can't be taken back
    generate = GenerationMixin.generate

    def __init__(self, config: TheseanConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.roles = Roles.read(config.roles or {}, config.vocab_size, self.signature, self.network)
        self._stream: Stream | str | None = None

    @property
    def stream(self) -> Stream | None:
        """The network with its states threaded through; None, with a warning, where it has to read all again."""
        if self._stream is None:
            with usual_settings():
                self._stream = stream_of(self.network, self.signature, self.roles)
            if isinstance(self._stream, str):
                warnings.warn(
                    f"this network decodes without a state and reads the whole text again for each token: "
                    f"{self._stream}",
                    UserWarning,
                    stacklevel=3,
                )
        return self._stream if isinstance(self._stream, Stream) else None

    def forward(  # type: ignore[override]  # as transformers' causal language models are called
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: CarriedStates | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **rest: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """ids_BT, mask_BT or mask_BS with S = P + T -> logits_BTV.

        With `past_key_values` or use_cache=True the network reads on from its states, each row as it would be alone,
        wherever its padding is; without, all is read at once, as in training. `labels`, -100 where nothing is asked,
        are shifted by one here. Raises DataError.
        """
        input_ids, as_tuple = checked_ids(input_ids), self._returns_tuples(rest)
        if rest.pop("inputs_embeds", None) is not None:
            raise DataError("inputs_embeds: a graph begins with its tables. Give input_ids.")
        options = {k: rest.pop(k) for k in ("num_items_in_batch", "shift_labels") if k in rest}
        for name in ("cache_position", *outputs_asked(rest)):
            rest.pop(name, None)
        past = None
        if (past_key_values is not None or use_cache) and (stream := self.stream) is not None:
            past = carried(past_key_values, stream.rows)
            time = input_ids.shape[1]
            check_mask(attention_mask, input_ids, past.steps)
            # of one token more, one is read: to look whether it is hidden would wait for the device
            told = None if attention_mask is None or (time == 1 and past.steps) else attention_mask[:, -time:]
            with self._telling({self.roles.tokens: input_ids}):
                logits_BTV = stream.read(input_ids, told, past)
        else:
            check_mask(attention_mask, input_ids, 0)
            logits_BTV = self._whole(input_ids, attention_mask, rest)
        loss = None
        if labels is not None:
            labels_BT, words = check_steps(labels, logits_BTV), logits_BTV.shape[-1]
            with telling(labels_BT, words):
                loss = self.loss_function(logits=logits_BTV, labels=labels_BT, vocab_size=words, **options)
        if not isinstance(logits_to_keep, (int, torch.Tensor)):
            raise DataError(f"logits_to_keep: expected a whole number or places, found {logits_to_keep!r}.")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV[:, kept], past_key_values=past)
        return output.to_tuple() if as_tuple else output

    def _whole(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, rest: dict[str, Any]) -> torch.Tensor:
        roles, steps = self.roles, None
        inputs: dict[str, Any] = {roles.tokens: ids_BT, **rest}
        if roles.mask is not None:
            inputs[roles.mask] = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        elif mask_BT is not None and not bool(mask_BT.all()):
            steps = Steps(mask_BT.to(torch.bool))  # in front, where nothing that is hidden comes before them
            inputs[roles.tokens] = steps.to_front(ids_BT)
        if roles.positions is not None and rest.get(roles.positions) is None:
            shown_BT = torch.ones_like(ids_BT) if mask_BT is None or steps is not None else mask_BT.long()
            inputs[roles.positions] = (shown_BT.cumsum(1) - 1).clamp_min(0)
        given = self._given(inputs)
        with self._telling(given):
            logits_BTV = leaf_values(self._run(given))[self._index]
        return logits_BTV if steps is None else steps.back(logits_BTV)

    @property
    def _index(self) -> int:
        return output_names(self.network).index(self.roles.logits)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._stream = None  # buffers were exchanged
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        if mode:
            self._stream = None  # may hold what was made of weights that change from here on
        return super().train(mode)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # its states are its own

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if getattr(generation_config, "cache_implementation", None) not in (None, "dynamic"):
            raise DataError(
                f"cache_implementation: expected 'dynamic' or none, found {generation_config.cache_implementation!r}: "
                "a converted network carries states of its own."
            )
        if generation_config.use_cache is False:
            return
        stream = self.stream
        if stream is None:
            generation_config.use_cache = False
            return
        mask_BT = model_kwargs.get("attention_mask")
        if not stream.packs and mask_BT is not None and not bool(mask_BT.all()):
            generation_config.use_cache = False  # rows that count together can't start apart
            return
        past = carried(model_kwargs.get("past_key_values"), stream.rows)
        past._is_user_defined = model_kwargs.get("past_key_values") is not None
        model_kwargs["past_key_values"] = past
