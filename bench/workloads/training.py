"""A real training job on the CPU: a transformer and AdamW, sized by the bytes of its state."""

from __future__ import annotations

import math
import mmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.measure.sampling import clock, note

CONTEXT = 64  # tokens
BYTES_PER_PARAMETER = 12  # fp32: the parameter and AdamW's two moments
WIDTHS = (768, 512, 256, 128, 64)
FEWEST_LAYERS = 6
MOST_SEQUENCES = 4096
HUGE_PAGE = 2 << 20  # bytes


def shape_for(parameters: int) -> tuple[int, int, int]:
    """(width, layers, vocabulary) of a network that has about so many parameters."""
    for width in WIDTHS:
        layer = 12 * width * width + 13 * width
        if parameters >= FEWEST_LAYERS * layer or width == WIDTHS[-1]:
            break
    layers = max(1, (parameters - 64 * width) // layer)
    return width, layers, max(64, (parameters - layers * layer) // width)


class Net(nn.Module):
    def __init__(self, parameters: int) -> None:
        super().__init__()
        width, layers, self.vocabulary = shape_for(parameters)
        self.embed = nn.Embedding(self.vocabulary, width)
        nn.init.normal_(self.embed.weight, std=0.02)  # as GPT-2: it gives the logits, too
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return x @ self.embed.weight.T


def state_of(parameters: int) -> dict[str, dict[str, Tensor]]:
    """Tensors as of that job's parameters and moments, without the job: random bytes that no disk can squeeze."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Net(parameters).named_parameters()}
    return {part: {name: torch.randn(shape) for name, shape in shapes.items()} for part in ("model", "exp_avg", "exp_avg_sq")}


def in_huge_pages(state: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """A copy whose large tensors lie in huge pages, where the system grants them."""
    return {part: {name: to_huge_pages(tensor) for name, tensor in tensors.items()} for part, tensors in state.items()}


def to_huge_pages(tensor: Tensor) -> Tensor:
    if tensor.nbytes < HUGE_PAGE:
        return tensor.clone()
    memory = mmap.mmap(-1, tensor.nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin).view(tensor.shape)
    return copy.copy_(tensor)


def bytes_of(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(bytes_of, state.values()))
    return sum(map(bytes_of, state)) if isinstance(state, (list, tuple)) else 0


class Trainer:
    """Forward, backward and step, each by itself, so that clocks can be put around them."""

    def __init__(self, state_bytes: int) -> None:
        torch.manual_seed(0)
        self.model = Net(state_bytes // BYTES_PER_PARAMETER)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.optimizer.register_step_pre_hook(self._note_hook)  # runs after the global hooks, ckpt's among them
        self._hook_ran_at = math.nan
        self.tokens = self._draw(1)
        self.forward_backward()
        self.step()  # now the optimizer has its state, and ckpt knows the optimizer

    def _draw(self, sequences: int) -> Tensor:
        return torch.randint(self.model.vocabulary, (sequences, CONTEXT + 1))

    def _note_hook(self, *_: Any) -> None:
        self._hook_ran_at = clock()

    def forward_backward(self) -> float:
        """Seconds it took.

        Each time with another batch: what is learned by heart leaves gradients so small (denormal) that the arithmetic becomes
        several times slower.
        """
        started = clock()
        self.tokens = torch.randint_like(self.tokens, self.model.vocabulary)
        logits = self.model(self.tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten()).backward()
        return clock() - started

    def step(self) -> float:
        """Seconds from the call of optimizer.step() until its pre-step hooks had run: the automatic fence, from outside."""
        started = clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._hook_ran_at - started

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def lengthen(self, seconds: float) -> float:
        """Chooses the batch so that forward plus backward takes about so long, at least; returns what it takes now."""
        taken = min(self.forward_backward() for _ in range(2))
        while taken < seconds and len(self.tokens) < MOST_SEQUENCES:
            growth = min(4.0, 1.05 * seconds / taken)
            self.tokens = self._draw(math.ceil(len(self.tokens) * growth))
            note(f"calibrating: {len(self.tokens)} sequences")
            taken = self.forward_backward()
        self.optimizer.zero_grad()
        return taken
