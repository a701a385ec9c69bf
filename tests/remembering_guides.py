"""Small causal language models with recurrences of matrices, and attentions with a gate.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import VOCABULARY, spread

WIDTH, HEADS = 16, 2


def chunk_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By the calling convention of kernels for it, one step after the other."""
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    shared = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(shared, 2).float() for x in (query, key))
    state = initial_state
    if state is None:
        state = torch.zeros(value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    outs = []
    for t in range(value.shape[1]):
        state = state * g[:, t, :, None, None].float().exp()
        held = (state * key[:, t, :, :, None]).sum(-2)
        update = beta[:, t, :, None] * (value[:, t] - held)
        state = state + key[:, t, :, :, None] * update[:, :, None]
        outs.append((state * query[:, t, :, :, None]).sum(-2) * query.shape[-1] ** -0.5)
    return torch.stack(outs, 1).to(value.dtype), state if output_final_state else None


def chunk_rule_of_features(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same, with a decay for each feature of a key; in float32 whatever comes."""
    dtype = v.dtype
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    state = initial_state
    if state is None:
        state = torch.zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    outs = []
    for t in range(v.shape[1]):
        state = state * g[:, t, :, :, None].exp()
        held = (state * k[:, t, :, :, None]).sum(-2)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - held))[:, :, None]
        outs.append((state * q[:, t, :, :, None]).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(outs, 1).to(dtype), state if output_final_state else None


def dual_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    """Mamba 2's, one step after the other; in float32 whatever comes."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).float()
    heads = hidden_states.shape[2]
    key, query = (x.float().repeat_interleave(heads // x.shape[2], 2) for x in (B, C))
    x = hidden_states.float()
    state = torch.zeros(*x[:, 0].shape, key.shape[-1]) if initial_states is None else initial_states
    outs = []
    for t in range(x.shape[1]):
        state = state * (A * dt[:, t]).exp()[..., None, None]
        state = state + (x[:, t] * dt[:, t, :, None])[..., None] * key[:, t, :, None]
        outs.append((state * query[:, t, :, None]).sum(-1))
    out = torch.stack(outs, 1)
    out = out if D is None else out + D[:, None] * x
    return (out, state) if return_final_states else out


def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """Mamba's, one step after the other; channels before time."""
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    state, outs = torch.zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        fed = (delta[..., t] * u[..., t])[..., None] * B[:, None, :, t]
        state = state * (delta[..., t, None] * A).exp() + fed
        outs.append((state * C[:, None, :, t]).sum(-1))
    out = torch.stack(outs, -1)
    out = out if D is None else out + u * D[:, None]
    out = out if z is None else out * F.silu(z)
    return (out, state) if return_last_state else out


class StateSpace(nn.Module):
    """x_BTD -> y_BTD, two heads of 4 channels, which share what is written and read."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.dt = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, HEADS)
        self.write, self.read, self.last = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3), nn.Linear(8, WIDTH)
        self.log, self.skip, self.bias = (nn.Parameter(torch.rand(HEADS)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = dual_scan(
            self.into(x).unflatten(-1, (HEADS, 4)), self.dt(x), -self.log.exp(), self.write(x).unsqueeze(2),
            self.read(x).unsqueeze(2), chunk_size=8, D=self.skip, z=None, dt_bias=self.bias, dt_softplus=True,
            dt_limit=(0.01, float("inf")),
        )  # fmt: skip
        return self.last(out.flatten(2).to(x.dtype))


class Scanned(nn.Module):
    """x_BTD -> y_BTD, a channel each with 3 states of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dt, self.write, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
        self.gate, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.log, self.skip = nn.Parameter(torch.rand(WIDTH, 3)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = (z.transpose(1, 2) for z in (x, self.dt(x), self.write(x), self.read(x), self.gate(x)))
        u, dt, write, read, gate = turned
        out = scan(u, dt, -self.log.exp(), write, read, self.skip, z=gate, delta_softplus=True)
        return self.last(out.transpose(1, 2))


class Both(nn.Module):
    """x_BTD -> y_BTD, a memory beside an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.attention = StateSpace(), GatedAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.memory(x) / 2 + self.attention(x)


class DeltaNet(nn.Module):
    """x_BTD -> y_BTD, two heads of values to one of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, HEADS * 3)
        self.rate, self.decay, self.last = nn.Linear(WIDTH, HEADS), nn.Linear(WIDTH, HEADS), nn.Linear(HEADS * 3, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = chunk_rule(
            self.query(x).unflatten(-1, (1, 4)),
            self.key(x).unflatten(-1, (1, 4)),
            self.value(x).unflatten(-1, (HEADS, 3)),
            g=-F.softplus(self.decay(x)),
            beta=self.rate(x).sigmoid(),
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=None,
        )
        return self.last(out.flatten(2))


class DeltaNetOfFeatures(nn.Module):
    """x_BTD -> y_BTD, two heads whose keys' features fade as fast as they each say."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.decay = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.value, self.rate, self.last = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, HEADS), nn.Linear(6, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value, decay = (
            f(x).unflatten(-1, (HEADS, -1)) for f in (self.query, self.key, self.value, self.decay)
        )
        out, _ = chunk_rule_of_features(
            query, key, value, g=-F.softplus(decay), beta=self.rate(x).sigmoid(), use_qk_l2norm_in_kernel=True
        )
        return self.last(out.flatten(2))


class GatedAttention(nn.Module):
    """x_BTD -> y_BTD; queries and the gate are one projection. `after` is what is done with the heads' outputs."""

    def __init__(self, after: str = "gate") -> None:
        super().__init__()
        self.after = after
        self.query, self.key, self.value = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, gate = self.query(x).chunk(2, -1)
        query, key, value = (
            z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in (query, self.key(x), self.value(x))
        )  # fmt: skip
        weights = None
        if self.after == "weights":
            scores = query @ key.mT * query.shape[-1] ** -0.5
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            heads = weights @ value
        else:
            heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        heads = heads.transpose(1, 2).flatten(2)
        if self.after == "norm":
            return self.last(self.norm(heads))
        if weights is not None:
            gate = gate + weights.diagonal(dim1=-2, dim2=-1).mean(1).unsqueeze(-1)
        return self.last(heads * gate.sigmoid())


class Layer(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.before, self.mixer, self.norm = nn.LayerNorm(WIDTH), mixer, nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.before(x))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Remembering(nn.Module):
    """ids_BT -> logits_BTV."""

    def __init__(self, *mixers: nn.Module) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(map(Layer, mixers))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def remembering(memory: type[nn.Module] = DeltaNet) -> nn.Module:
    torch.manual_seed(0)
    return spread(Remembering(memory(), GatedAttention()).eval())


def gated(after: str = "gate") -> nn.Module:
    torch.manual_seed(0)
    return spread(Remembering(GatedAttention(after)).eval())


class LatentAttention(nn.Module):
    """x_BTD -> y_BTD, two heads of queries and keys of 6 features, of which the last 4 are `turned` by their step as
    "halves", "neighbours" or "complex" numbers, or left (""); those of a key are one row for both heads. The rest of
    the keys and the values are made of a normed latent, and queries too where they have one. Keys are put together as
    they are `written`: "cat" or "writes".
    """

    PLAIN, TURNED, VALUE = 2, 4, 3

    def __init__(
        self, turned: str = "halves", of_queries: bool = False, written: str = "cat", gated: bool = False
    ) -> None:
        super().__init__()
        self.turned, self.of_queries, self.written, self.gated = turned, of_queries, written, gated
        width = self.PLAIN + self.TURNED
        self.down, self.norm = nn.Linear(WIDTH, 5 + self.TURNED, bias=False), nn.LayerNorm(5)
        self.up = nn.Linear(5, HEADS * (self.PLAIN + self.VALUE))
        self.query_down, self.query_norm = nn.Linear(WIDTH, 7), nn.LayerNorm(7)
        self.query = nn.Linear(7 if of_queries else WIDTH, HEADS * width)
        self.gate, self.last = nn.Linear(WIDTH, HEADS * self.VALUE), nn.Linear(HEADS * self.VALUE, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = self.query_norm(self.query_down(x)) if self.of_queries else x
        query = self.query(read).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        plain, turned = query.split([self.PLAIN, self.TURNED], -1)
        query = torch.cat([plain, self.turn(turned)], -1)
        latent, shared = self.down(x).split([5, self.TURNED], -1)
        key, value = (
            self.up(self.norm(latent)).unflatten(-1, (HEADS, -1)).transpose(1, 2).split([self.PLAIN, self.VALUE], -1)
        )
        shared = self.turn(shared.unsqueeze(1)).expand(-1, HEADS, -1, -1)
        if self.written == "writes":
            whole = key.new_empty(*key.shape[:-1], self.PLAIN + self.TURNED)
            whole[..., : self.PLAIN] = key
            whole[..., self.PLAIN :] = shared
        else:
            whole = torch.cat([key, shared], -1)
        mixed = F.scaled_dot_product_attention(query, whole, value, is_causal=True).transpose(1, 2).flatten(2)
        return self.last(mixed * self.gate(x).sigmoid() if self.gated else mixed)

    def turn(self, x_BHTC: torch.Tensor) -> torch.Tensor:
        if not self.turned:
            return x_BHTC
        step_T1 = torch.arange(x_BHTC.shape[2], dtype=torch.float32).unsqueeze(-1)
        angle_TP = step_T1 * torch.tensor([1.0, 0.03])
        if self.turned == "complex":
            pairs = torch.view_as_complex(x_BHTC.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle_TP), angle_TP)).flatten(-2)
        cos, sin = angle_TP.cos(), angle_TP.sin()
        if self.turned == "neighbours":
            x_BHTC = x_BHTC.unflatten(-1, (-1, 2)).mT.flatten(-2)
        a, b = x_BHTC.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def latent(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return spread(Remembering(LatentAttention(**settings), LatentAttention(**settings)).eval())
