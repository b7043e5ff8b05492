"""What the benchmarks share: calls timed in turn, training steps, the ceiling of a step, and a row of the table."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Call = Callable[[], object]
Seconds = Mapping[str, list[float]]


@dataclass(frozen=True)
class Options:
    rounds: int
    threads: int
    compiled: bool
    quick: bool

    def clock(self) -> float:
        """Seconds: of the processor where one thread computes, so that other programs' turns do not count; else of the wall."""
        return time.process_time() if self.threads == 1 else time.perf_counter()


@dataclass(frozen=True)
class Row:
    """One line of the table; a cell that is empty has no counterpart."""

    system: str
    what: str
    vitkit: str
    documented: str = ""
    tuned: str = ""
    ceiling: str = ""
    wanted: str = ""
    peer: str = ""


def in_turn(calls: Mapping[str, Call], rounds: int, clock: Callable[[], float], warm_up: int = 1) -> Seconds:
    """Seconds of every call in each round: all calls, one after another, then the next round; warm-up does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-warm_up, rounds):
        for name, call in calls.items():
            began = clock()
            call()
            if number >= 0:
                seconds[name].append(clock() - began)
    return seconds


def times(seconds: Seconds, other: str, ours: str = "vitkit") -> str:
    """How many times as long `other` takes as `ours`: the median of the rounds' ratios, (least–most)."""
    ratios = [a / b for a, b in zip(seconds[other], seconds[ours], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def share(seconds: Seconds, part: str, whole: str, digits: int = 0) -> str:
    """`part` in percent of `whole`: the median of the rounds' ratios, (least–most)."""
    ratios = [100 * a / b for a, b in zip(seconds[part], seconds[whole], strict=True)]
    return f"{statistics.median(ratios):.{digits}f} % ({min(ratios):.{digits}f}–{max(ratios):.{digits}f})"


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: Optimizer, *, bf16: bool, compiled: bool = False
) -> Call:
    """A call that takes one step: `loss()`, which calls `model`, under autocast or not; its gradient; the optimiser's step."""
    if compiled:
        model.compile(dynamic=False)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_steps(
    system: str, what: str, unit: str, count: int, steps: dict[str, Call], options: Options, *, wanted: str, peer: str
) -> Row:
    """The row of a training step: "vitkit", "documented" and "tuned" beside the ceiling of vitkit's, in turn."""
    steps["vitkit"]()  # optimisers make their state in the first step
    calls = {**steps, "ceiling": Products.of(steps["vitkit"])}
    seconds = in_turn(calls, options.rounds, options.clock)
    return Row(
        system, what, f"{count / statistics.median(seconds['vitkit']):.0f} {unit}/s",
        times(seconds, "documented"), times(seconds, "tuned"), share(seconds, "ceiling", "vitkit"), wanted, peer,
    )  # fmt: skip


class Products(TorchDispatchMode):
    """The matrix products and convolutions of what runs inside it, to be run again alone by calling it.

    Each has its own operation, shape, layout and dtype, and operands of its own kind that stay in memory: a ceiling that a
    step of the same products cannot reach. Products with a vector are sums and do not count. Of torch's fused attention only
    its batched products count: two forward, four backward.
    """

    @classmethod
    def of(cls, call: Call) -> "Products":
        with cls() as products:
            call()
        return products

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.flops = 0
        self._standing_in: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in (ATTENTION, ATTENTION_BACKWARD):
            backward = packet is ATTENTION_BACKWARD  # its first argument is the output's gradient
            q, k = (heads.flatten(0, 1) for heads in args[backward : backward + 2])  # (b·h n d)
            weights = q.new_zeros(q.shape[0], q.shape[1], k.shape[1])
            with self:
                for _ in range(2 if backward else 1):
                    torch.bmm(q, k.transpose(1, 2))
                    torch.bmm(weights, k)
            return out
        matrices = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim > 1]
        if packet in flop_registry and not any(1 in matrix.shape[-2:] for matrix in matrices if matrix.ndim < 4):
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
            self.calls.append((
                func,
                tuple(self._stand_in(arg, place) for place, arg in enumerate(args)),
                {name: self._stand_in(arg, name) for name, arg in kwargs.items()},
            ))  # fmt: skip
        return out

    def __call__(self) -> None:
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)

    def _stand_in(self, value: Any, place: Any) -> Any:
        """A tensor of the same kind; one serves all calls that have such a tensor in that place."""
        if not isinstance(value, Tensor):
            return value
        key = (place, value.shape, value.stride(), value.dtype)
        if key not in self._standing_in:
            reach = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
            drawn = torch.randn(reach).to(value.dtype)
            self._standing_in[key] = drawn.as_strided(value.shape, value.stride())
        return self._standing_in[key]
