"""The training job of the GPU benchmark: a GPT in bf16, with fp32 master weights and AdamW's moments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpu.device import Device
from bench.measure.sampling import clock, note

BYTES_PER_PARAMETER = 14  # bf16: 2; the fp32 master and two moments: 12
WIDTHS = (2048, 1024, 512, 256, 128, 64)
FEWEST_LAYERS = 6
HEAD = 64
MOST_WORDS = 32768
LARGE = 1024  # from this width on there are as many tokens as keep a GPU busy
SEQUENCES, CONTEXT = 8, 1024
SMALL_SEQUENCES, SMALL_CONTEXT = 2, 64
TRIES = 3


class Shape(NamedTuple):
    width: int
    layers: int
    words: int


def shape_for(parameters: int) -> Shape:
    """A network of at least so many parameters, and not many more."""
    for width in WIDTHS:
        layer = 12 * width * width + 13 * width
        if parameters >= FEWEST_LAYERS * layer or width == WIDTHS[-1]:
            break
    words = min(MOST_WORDS, max(64, parameters // (8 * width)))
    return Shape(width, max(1, math.ceil((parameters - words * width) / layer)), words)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.before_widening = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        sequences, tokens, width = x.shape
        queries, keys, values = (
            self.attend(self.before_attention(x)).view(sequences, tokens, 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        )
        seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.merge(seen.transpose(1, 2).reshape(sequences, tokens, width))
        return x + self.narrow(F.gelu(self.widen(self.before_widening(x))))


class Gpt(nn.Module):
    def __init__(self, shape: Shape, context: int) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.words, shape.width)
        self.places = nn.Embedding(context, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width) for _ in range(shape.layers))
        self.last = nn.LayerNorm(shape.width)
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.last(x) @ self.words.weight.T


class Held(NamedTuple):
    """How the step was held up before it could begin: on the host, and points in the work of the device."""

    host_s: float
    began: Any
    ended: Any


class GpuTrainer:
    """Forward + backward and step, each by itself, so that clocks can be put around them.

    Mixed precision as simple as it can be: AdamW owns fp32 copies of the bf16 parameters. Gradients go there before its step,
    and the values come back after it: behind the fence, in stream order.
    """

    def __init__(self, parameters: int, device: Device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.shape = shape_for(parameters)
        large = self.shape.width >= LARGE
        self.sequences, self.context = (SEQUENCES, CONTEXT) if large else (SMALL_SEQUENCES, SMALL_CONTEXT)
        with device.torch_device:
            self.model = Gpt(self.shape, self.context).to(torch.bfloat16)
            self.tokens = torch.randint(self.shape.words, (self.sequences, self.context + 1))
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in self.model.named_parameters()}
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=1e-5, fused=True)
        self.optimizer.register_step_pre_hook(self._note_hook)  # runs after the global hooks, ckpt's among them
        self._hook_ran_at, self._hook_mark = math.nan, None
        self.micro_steps = 1
        for _ in range(2):  # now the optimizer has its state, torch its memory, and ckpt knows the optimizer
            self.forward_backward()
            self.step()
        device.synchronize()

    def _note_hook(self, *_: Any) -> None:
        self._hook_ran_at = clock()
        self._hook_mark = self.device.mark()
        self.device.keep_order()

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def forward_backward(self) -> None:
        """All micro-steps; at the end the optimizer has the gradients. On a GPU it returns before that is done."""
        for _ in range(self.micro_steps):
            logits = self.model(self.tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten()).backward()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        torch._foreach_copy_([master.grad for master in self.masters.values()], gradients)
        for parameter in self.model.parameters():
            parameter.grad = None

    def step(self, wait: Callable[[], None] | None = None) -> Held:
        """
        Args:
            wait: what must be waited for before tensors may change, other than the automatic fence.

        Returns:
            what happened from the call until the hooks of optimizer.step() had run.
        """
        began = self.device.mark()
        started = clock()
        if wait is not None:
            wait()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), list(self.masters.values()))
        return Held(self._hook_ran_at - started, began, self._hook_mark)

    def state(self) -> dict[str, Any]:
        masters = {name: master.detach() for name, master in self.masters.items()}
        return {"model": self.model.state_dict(), "masters": masters, "optimizer": self.optimizer.state_dict()}

    def timed(self) -> float:
        """Seconds of forward + backward, to its end on the device."""
        self.device.synchronize()
        started = clock()
        self.forward_backward()
        self.device.synchronize()
        return clock() - started

    def lengthen(self, seconds: float) -> float:
        """Chooses the number of micro-steps so that forward + backward takes at least so long; returns what it takes now."""
        self.micro_steps = 1
        one = taken = min(self.timed() for _ in range(2))
        for attempt in range(TRIES):
            if taken >= seconds:
                break
            self.micro_steps = math.ceil((1.05 + attempt / 10) * seconds / one)
            note(f"calibrating: {self.micro_steps} micro-steps")
            taken = self.timed()
            one = min(one, taken / self.micro_steps)
        return taken
