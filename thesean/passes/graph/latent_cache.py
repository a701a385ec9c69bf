"""The module that stands in a graph for a causal attention whose keys and values are made of what it remembers.

B batch, T new steps, P steps that are remembered, S = P + T, D width, R width of the latent, H heads of queries, G
heads of keys and values, K width of queries and keys, V of values
"""

from __future__ import annotations

import torch
from torch import nn

from thesean.targets.shared.core import Core
from thesean.targets.shared.softmax_heads import SoftmaxHeads


class CachedLatent(nn.Module):
    """x_BTD, bias_B1TS, latent_BPR -> y_BTD, latent_BSR.

    Where nothing lies between a key and its use, q.(U c) is (U'q).c, and what a softmax does to U c + b is U of what it
    does to c, plus b: scores and means are of the latent itself (DeepSeek-AI 2024, section 2.1.2), and the bias of a
    key, the same for all of them, makes no difference. Else the keys and values of all S steps are made anew, and keys
    turned by their row: as row 0 is a sequence's first step, or stands before it, distances are right.
    """

    stateful = True
    grows = 1
    reads = 2  # tensors that come before the state

    def __init__(self, part: SoftmaxHeads) -> None:
        super().__init__()
        self.part = part
        self.core = Core("cached_attention", cap=None, window=None)

    @property
    def is_met_as_it_is(self) -> bool:
        return self.part.rotate is None and not len(self.part.norms)

    def forward(
        self, x_BTD: torch.Tensor, bias_B1TS: torch.Tensor, latent_BPR: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        part, new_BTR = self.part, self.part.read(x_BTD)
        past_BPR = new_BTR[:, :0] if latent_BPR is None else latent_BPR
        query_BTHK = part.scale * part.queries(x_BTD)
        if self.is_met_as_it_is:
            mixed_BTHV, latent_BSR = self._within(query_BTHK, new_BTR, bias_B1TS, past_BPR)
        else:
            latent_BSR = torch.cat([past_BPR, new_BTR], 1)
            mixed_BTHV = self._made_anew(query_BTHK, latent_BSR, bias_B1TS)
        y_BTD: torch.Tensor = part.last(mixed_BTHV.flatten(2))
        return y_BTD, latent_BSR

    def _within(
        self, query_BTHK: torch.Tensor, new_BTR: torch.Tensor, bias_B1TS: torch.Tensor, past_BPR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        part, groups = self.part, self.part.kv_heads
        key_GKR, value_GVR = (m.weight.unflatten(0, (groups, -1)) for m in (part.key, part.value))
        query_BTGNK = query_BTHK.unflatten(2, (groups, -1))
        query_BHTR = torch.einsum("btgnk,gkr->bgntr", query_BTGNK, key_GKR).flatten(1, 2)
        new_B1TR, past_B1PR = new_BTR.unsqueeze(1), past_BPR.unsqueeze(1)
        mean_BHTR, latent_B1SR, _ = self.core(query_BHTR, new_B1TR, new_B1TR, bias_B1TS, past_B1PR, past_B1PR)
        mean_BGNTR = mean_BHTR.unflatten(1, (groups, -1))
        mixed_BTGNV = torch.einsum("bgntr,gvr->btgnv", mean_BGNTR, value_GVR)
        return (mixed_BTGNV + part.value.bias.view(groups, 1, -1)).flatten(2, 3), latent_B1SR.squeeze(1)

    def _made_anew(self, query_BTHK: torch.Tensor, latent_BSR: torch.Tensor, bias_B1TS: torch.Tensor) -> torch.Tensor:
        part, (time, length) = self.part, bias_B1TS.shape[2:]
        key_BSGK = part.keys(latent_BSR)
        value_BGSV = part.value(latent_BSR).unflatten(-1, (part.kv_heads, -1)).transpose(1, 2)
        if part.rotate is not None:
            step_S = torch.arange(length, device=latent_BSR.device)
            key_BSGK = part.rotate.turn_by(key_BSGK, *part.rotate.tables_at(step_S, key_BSGK))
            own_T = torch.arange(time, device=latent_BSR.device) + (length - time)
            query_BTHK = part.rotate.turn_by(query_BTHK, *part.rotate.tables_at(own_T, query_BTHK))
        key_BGSK = key_BSGK.transpose(1, 2)
        none = (key_BGSK[:, :, :0], value_BGSV[:, :, :0])
        mixed_BHTV, _, _ = self.core(query_BTHK.transpose(1, 2), key_BGSK, value_BGSV, bias_B1TS, *none)
        mixed_BTHV: torch.Tensor = mixed_BHTV.transpose(1, 2)
        return mixed_BTHV
