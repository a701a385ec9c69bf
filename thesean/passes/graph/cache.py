"""The modules that stand in a graph for a causal attention which remembers: keys and values are its state.

B batch, T new steps, P steps that are remembered, S = P + T, H heads of queries, G heads of keys and values, K width of
queries and keys, C width of values
"""

from __future__ import annotations

import torch
from torch import nn

from thesean.kernels.cached_attention import latest
from thesean.targets.shared.core import Core
from thesean.targets.shared.distance_bias import Reach


class SeenKeys(nn.Module):
    """token_BT, token_BP -> (bias_B1TS, token_BS): 0 where query t sees key s, and a score that counts for nothing.

    It sees what holds a token, is no later, and with a `window` of W is less than W steps back. What is remembered is
    which steps held a token: a row of zeros has none, so that it is at its sequence's start wherever the others are.
    With a bias of the `distance` it is bias_BHTS, that of each pair instead of 0: steps apart, or tokens apart where
    they are `counted`.
    """

    stateful = True
    grows = 1  # the dimension of its state that is as long as what is remembered

    def __init__(
        self, window: int | None, dtype: torch.dtype, distance: Reach | None = None, counted: bool = False
    ) -> None:
        super().__init__()
        self.window = window
        self.dtype = dtype
        self.counted = counted
        self.table_HD: torch.Tensor | None
        self.slope_H: torch.Tensor | None
        self.register_buffer("table_HD", None if distance is None else distance.table_HD)
        self.register_buffer("slope_H", None if distance is None else distance.slope_H)

    def forward(
        self, token_BT: torch.Tensor, token_BP: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        token_BS = token_BT if token_BP is None else torch.cat([token_BP, token_BT], 1)
        time, length = token_BT.shape[1], token_BS.shape[1]
        key_S = torch.arange(length, device=token_BT.device)
        query_T1 = torch.arange(time, device=token_BT.device).unsqueeze(1) + (length - time)
        seen_TS = key_S <= query_T1
        if self.window is not None:
            seen_TS = seen_TS & (key_S > query_T1 - self.window)
        # half of the smallest number: added to a score it doesn't overflow, and a row that sees nothing stays finite;
        # at most float32's, which is what `where` makes of two numbers
        nothing = max(torch.finfo(self.dtype).min, torch.finfo(torch.float32).min) / 2
        seen_BTS = seen_TS & token_BS.unsqueeze(1)
        after = latest(token_BS, 1, self.window)
        if self.table_HD is None or self.slope_H is None:
            return torch.where(seen_BTS, 0.0, nothing).to(self.dtype).unsqueeze(1), after
        place_BS = token_BS.to(torch.int64).cumsum(1) if self.counted else key_S.unsqueeze(0)
        distance_BTS = (place_BS[:, length - time :].unsqueeze(2) - place_BS.unsqueeze(1)).clamp_min(0)
        bias_BHTS = Reach(self.table_HD, self.slope_H).of(distance_BTS).transpose(0, 1)
        return torch.where(seen_BTS.unsqueeze(1), bias_BHTS, nothing).to(self.dtype), after

    def extra_repr(self) -> str:
        told = {"window": self.window, "heads": None if self.slope_H is None else len(self.slope_H)}
        return ", ".join(f"{name}={value}" for name, value in told.items() if value is not None)


class CachedAttention(nn.Module):
    """query_BHTK, key_BGTK, value_BGTC, bias_B1TS, (key_BGPK, value_BGPC) -> mixed_BHTC, (key_BGSK, value_BGSC).

    softmax(scale q k' + bias) v, or with a `cap` of c softmax(c tanh(scale q k' / c) + bias) v; each of the G heads of
    keys serves H / G heads of queries in a row, and is kept once. With a `window` of W the last W - 1 steps are kept.
    A `sink_H` is the score of one more key of each head, whose value is zero.
    """

    stateful = True
    grows = 2
    reads = 4  # tensors that come before the state

    def __init__(
        self,
        scale: float,
        cap: float | None = None,
        window: int | None = None,
        sink_H: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.cap = cap
        self.window = window
        self.sink_H: torch.Tensor | None
        self.register_buffer("sink_H", sink_H)
        self.core = Core("cached_attention", cap=cap, window=window)

    def forward(
        self,
        query_BHTK: torch.Tensor,
        key_BGTK: torch.Tensor,
        value_BGTC: torch.Tensor,
        bias_B1TS: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        past_BGPK, past_BGPC = (key_BGTK[:, :, :0], value_BGTC[:, :, :0]) if state is None else state
        query_BHTK = query_BHTK if self.scale == 1 else self.scale * query_BHTK
        sink = () if self.sink_H is None else (self.sink_H,)
        mixed_BHTC, *state_after = self.core(query_BHTK, key_BGTK, value_BGTC, bias_B1TS, past_BGPK, past_BGPC, *sink)
        return mixed_BHTC, (state_after[0], state_after[1])

    def extra_repr(self) -> str:
        told = {"scale": self.scale, "cap": self.cap, "window": self.window}
        sinks = [] if self.sink_H is None else [f"sinks={len(self.sink_H)}"]
        return ", ".join([*(f"{name}={value:g}" for name, value in told.items() if value is not None), *sinks])
