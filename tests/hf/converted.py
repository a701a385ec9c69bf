"""Small language models, converted, and a tokenizer of a few words: nothing is downloaded.

B batch, T time
"""

from __future__ import annotations

from typing import Any

import torch

import thesean
from tests.captured import shared
from tests.guides import gpt2, ids, llama
from tests.models import VOCABULARY, spread
from thesean.converted import Converted

PAD = VOCABULARY - 2


def example(length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(3, length, seed), "attention_mask": torch.ones(3, length, dtype=torch.long)}


@shared
def bounded(keep: str = "") -> Converted:
    """Rotary, grouped queries, told which steps are padding; attentions that hold a few tokens, `keep` the guide's."""
    torch.manual_seed(0)
    target = thesean.Target("bounded-attention", window=3, kept=2)
    return thesean.compile(
        spread(llama().eval()),
        target,
        recipe="fast",
        data=[example(seed=seed) for seed in range(2)],
        keep=[keep] if keep else [],
        progress=False,
    )


@shared
def counted() -> Converted:
    """A table of learnt positions, no mask among the inputs, one attention kept."""
    torch.manual_seed(0)
    data = [{"input_ids": ids(3, 12, seed)} for seed in range(2)]
    return thesean.compile(
        spread(gpt2().eval()), "rnn", recipe="fast", data=data, keep=["transformer.h.0"], progress=False
    )


@shared
def placed() -> Converted:
    """Told at which position each token stands."""
    torch.manual_seed(0)
    steps_BT = torch.arange(12).expand(3, 12).clone()
    data = [{**example(seed=seed), "position_ids": steps_BT} for seed in range(2)]
    return thesean.compile(
        spread(gpt2().eval()), "rnn", recipe="fast", data=data, keep=["transformer.h.0"], progress=False
    )


def tokenizer(side: str = "left") -> Any:
    """w0, w1... and padding, one id a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{k}": k for k in range(PAD)} | {"<pad>": PAD, "<unk>": PAD + 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", padding_side=side, model_max_length=64
    )


def padded(*lengths: int, seed: int = 3) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded on the left."""
    longest = max(lengths)
    ids_BT = ids(len(lengths), longest, seed)
    mask_BT = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
    return {"input_ids": ids_BT.masked_fill(mask_BT == 0, PAD), "attention_mask": mask_BT}
