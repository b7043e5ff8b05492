"""How time and memory of attention grow with the number of tokens: softmax, linear, windows, spatial reduction.

    python -m tests.benchmarks attention-cost [--tokens 64 256 1024 4096] [--width 128] [--heads 4] [--rounds 3] [--threads 1]

One block's attention, linear maps of queries, keys, values and output included, forward and backward, of a square grid of tokens. The
batch becomes smaller as the number of tokens grows, so that all rows have the same number of tokens in a step. Times are processor
time of one thread in microseconds a token, the median over rounds in which all kinds take turns in one process. Memory is that
of the tensors that the forward pass keeps for the backward pass, in bytes a token. The last lines say from how many tokens each kind
takes less time than softmax, between two measured numbers by a straight line in logarithms.

- softmax: `vitkit_vit`'s attention over all tokens.
- linear: φ(Q)·(φ(K)ᵀ·V), in fp32.
- windowed: windows of 4×4 tokens, every block of one kind: without a shift.
- reduced: PVT's attention, keys and values reduced by 2 on each side, and by 4.
"""

import argparse
import datetime
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.runs import processor
from vitkit_vit.attention import Attention, Layout
from vitkit_zoo.pvt import ReducedAttention

from .timing import Options, in_turn

KINDS = ("softmax", "linear", "windowed", "reduced by 2", "reduced by 4")
WINDOW = 4


def build(kind: str, side: int, width: int, heads: int) -> Callable[[Tensor], Tensor]:
    """Attention of a grid of `side`×`side` tokens: tokens `(b n d)` → `(b n d)`."""
    torch.manual_seed(0)
    if kind.startswith("reduced"):
        reduced = ReducedAttention(width, heads, int(kind.split()[-1]), 0.0, 0.0)
        return lambda x: reduced(x.unflatten(1, (side, side))).flatten(1, 2)
    names: dict[str, Any] = {"softmax": "softmax", "linear": "linear", "windowed": "windowed"}
    attention = Attention(width, heads, 0.0, kind=names[kind], window=WINDOW)
    return partial(attention, layout=Layout(0, (side, side), torch.arange(side * side), 0, complete=True))


def step(call: Callable[[Tensor], Tensor], x: Tensor, *, bf16: bool) -> None:
    """One forward and backward pass."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = call(x)
    torch.autograd.grad(y.float().sum(), [x, *parameters_of(call)])


def parameters_of(call: Any) -> list[nn.Parameter]:
    modules = [call.func] if isinstance(call, partial) else [cell.cell_contents for cell in call.__closure__]
    return [parameter for module in modules if isinstance(module, nn.Module) for parameter in module.parameters()]


def kept_bytes(call: Callable[[Tensor], Tensor], x: Tensor, *, bf16: bool) -> int:
    """Bytes of the tensors that the forward pass keeps for the backward pass, parameters and input not counted."""
    seen = {x.untyped_storage().data_ptr(): 0} | {p.untyped_storage().data_ptr(): 0 for p in parameters_of(call)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        kept = call(x)
    assert kept.requires_grad  # it holds the tensors until here, so that no storage is counted twice
    return sum(seen.values())


def crossing(tokens: Sequence[int], softmax: Sequence[float], other: Sequence[float]) -> str:
    """From how many tokens `other` takes less time than `softmax`."""
    gains = [math.log(a / b) for a, b in zip(softmax, other, strict=True)]
    if gains[0] > 0:
        return f"{tokens[0]} or fewer"
    for (n, before), (m, after) in zip(zip(tokens, gains, strict=True), list(zip(tokens, gains, strict=True))[1:], strict=False):
        if before <= 0 < after:
            share = -before / (after - before)
            return f"about {round(math.exp(math.log(n) + share * (math.log(m) - math.log(n))))}"
    return f"more than {tokens[-1]}"


def measure(tokens: Sequence[int], *, width: int, heads: int, rounds: int, total: int, bf16: bool, clock: Any) -> dict[str, Any]:
    """Microseconds and bytes a token of each kind, for each number of tokens."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    memory: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for count in tokens:
        side = math.isqrt(count)
        batch = max(1, total // count)
        x = torch.randn(batch, count, width, requires_grad=True)
        calls = {kind: build(kind, side, width, heads) for kind in KINDS}
        timed: Mapping[str, list[float]] = in_turn(
            {kind: partial(step, call, x, bf16=bf16) for kind, call in calls.items()}, rounds, clock
        )
        for kind, call in calls.items():
            seconds[kind].append(1e6 * statistics.median(timed[kind]) / (batch * count))
            memory[kind].append(kept_bytes(call, x, bf16=bf16) / (batch * count))
    return {"microseconds": seconds, "bytes": memory}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks attention-cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096], help="square numbers that 16 divides")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--total", type=int, default=16_384, help="tokens in a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    given = parser.parse_args(words)
    wrong = [count for count in given.tokens if math.isqrt(count) ** 2 != count or math.isqrt(count) % WINDOW]
    if wrong:
        parser.error(f"{wrong[0]} tokens are no square grid that windows of {WINDOW}×{WINDOW} divide; take 64, 256, 1024 or 4096")
    torch.set_num_threads(given.threads)
    clock = Options(given.rounds, given.threads, False, False).clock
    bf16 = given.precision == "bf16"
    results = measure(
        given.tokens, width=given.width, heads=given.heads, rounds=given.rounds, total=given.total, bf16=bf16, clock=clock
    )
    header = " | ".join(f"{count} tokens" for count in given.tokens)
    print(f"| attention | {header} | less time than softmax from |\n|" + "---|" * (len(given.tokens) + 2))
    for kind in KINDS:
        times, sizes = results["microseconds"][kind], results["bytes"][kind]
        cells = " | ".join(f"{time:.1f} µs, {size / 1024:.1f} KiB" for time, size in zip(times, sizes, strict=True))
        pays = "" if kind == "softmax" else crossing(given.tokens, results["microseconds"]["softmax"], times)
        print(f"| {kind} | {cells} | {pays} |")
    print(
        f"\nPer token, forward and backward, width {given.width}, {given.heads} heads, {given.precision}, {given.threads} thread(s), "
        f"{given.rounds} rounds; {datetime.date.today()}, {processor()}; torch {torch.__version__}, seed 0"
    )
