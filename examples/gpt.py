"""A small byte-level GPT and the text it learns from. Nothing here knows that it is being saved."""

from __future__ import annotations

import math
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256  # a token is a byte


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    width: int
    context: int  # tokens
    dropout: float


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        q, k, v = self.qkv(x).view(batch, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(y.transpose(1, 2).reshape(batch, context, width))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.norm2 = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width),
            nn.GELU(),
            nn.Linear(4 * shape.width, shape.width),
        )
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight  # tied: one tensor under two names
        self.apply(self._initialise)
        for name, p in self.named_parameters():  # the layers that write into the residual stream
            if name.endswith(("attention.out.weight", "mlp.2.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape.layers))

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of predicting each next byte, in nats."""
        where = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(where))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def read_text(path: Path | None) -> bytes:
    """The bytes of `path`, or by default the documentation that ships inside every CPython."""
    if path is not None:
        return path.read_bytes()
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics)).encode()


class Batches:
    """Windows of a text, shuffled, and dealt to the ranks in turn. Where it stands is two integers, so it resumes exactly.

    The order of each epoch follows from (seed, epoch) alone, and owes nothing to the global RNG. It is the same on all ranks.
    So are the two integers, which count for all of them: another number of ranks can go on from there.
    """

    def __init__(self, text: bytes, batch: int, context: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._context, self._seed, self._rank, self._ranks = context, seed, rank, ranks
        self._round = batch * ranks  # windows that all ranks together take at a time
        self._windows = (len(text) - 1) // context
        if self._windows < self._round:
            needed = self._round * context + 1
            raise SystemExit(f"the text has {len(text)} bytes: one batch needs at least {needed}")
        self._begin_epoch(0, 0)

    def _begin_epoch(self, epoch: int, taken: int) -> None:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        self._order = torch.randperm(self._windows, generator=generator).tolist()
        self._epoch, self._taken = epoch, taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._begin_epoch(state["epoch"], state["taken"])

    def next(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._taken + self._round > self._windows:
            self._begin_epoch(self._epoch + 1, 0)
        chosen = self._order[self._taken + self._rank : self._taken + self._round : self._ranks]
        self._taken += self._round
        starts = [window * self._context for window in chosen]
        rows = torch.stack([self._text[at : at + self._context + 1] for at in starts]).long()
        rows = rows.to(device)
        return rows[:, :-1], rows[:, 1:]
