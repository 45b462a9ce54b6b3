"""Phi-3 in PyTorch: fused qkv and gate-up, grouped queries, rotary positions, a sliding window; no biases.

The parameters have transformers' names, so that a state dict loads into Phi3ForCausalLM (train.py compares the two).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Config:
    vocab: int
    hidden: int = 256  # in-dimensions are multiples of 256, so that every K-quant fits
    ff: int = 1024
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    context: int = 1024
    window: int = 127  # keys that a query sees, itself included
    eps: float = 1e-5
    theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class RMSNorm(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c.hidden))
        self.eps = c.eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.qkv_proj = nn.Linear(c.hidden, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        c, (batch, length, _) = self.c, x.shape
        heads = self.qkv_proj(x).view(batch, length, -1, c.head_dim).transpose(1, 2)  # (batch, heads, length, head_dim)
        q, k, v = heads.split((c.heads, c.kv_heads, c.kv_heads), dim=1)
        q, k = rotate(q, *rope), rotate(k, *rope)
        groups = c.heads // c.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        o = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return self.o_proj(o.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden, 2 * c.ff, bias=False)
        self.down_proj = nn.Linear(c.ff, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c), RMSNorm(c)
        self.self_attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Phi3(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(c.vocab, c.hidden),
                "layers": nn.ModuleList(Layer(c) for _ in range(c.layers)),
                "norm": RMSNorm(c),
            }
        )
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.04 / (2 * c.layers) ** 0.5 if residual else 0.04)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (batch, length) -> the last layer's normed states (batch, length, hidden)."""
        length = ids.shape[1]
        frequencies = self.c.theta ** (-torch.arange(0, self.c.head_dim, 2).float() / self.c.head_dim)
        angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)  # (length, head_dim)
        q, k = torch.arange(length)[:, None], torch.arange(length)[None]
        mask = (k <= q) & (k > q - self.c.window)
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, (angles.cos(), angles.sin()), mask)
        return self.model["norm"](x)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, length) -> logits (batch, length, vocab)."""
        return self.lm_head(self.hidden(ids))
