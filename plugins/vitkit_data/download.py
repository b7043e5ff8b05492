"""Downloads of published datasets by torchvision; without a network an error comes within seconds."""

import contextlib
import io
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from torch import Tensor

ANSWER_SECONDS = 6.0
"""Time to wait for the first answer of any host: without a network a recipe should fall back soon."""
STALL_SECONDS = 20.0
"""Time for which a running download may receive nothing."""


def download(name: str) -> tuple[dict[str, Tensor], list[str]]:
    """A class of `torchvision.datasets` in the store's form: tensors and class names."""
    from torchvision import datasets as published

    factory: Any = getattr(published, name)
    require_answer(getattr(factory, "mirrors", None) or [factory.url])
    tensors: dict[str, Tensor] = {}
    classes: list[str] = []
    with tempfile.TemporaryDirectory() as folder, _stall_timeout(), contextlib.redirect_stdout(io.StringIO()):
        for split in ("train", "test"):
            dataset = factory(folder, train=split == "train", download=True)
            pixels = torch.as_tensor(dataset.data)
            # (n h w) of grey images, (n h w c) of coloured ones → (n c h w)
            tensors[f"{split}.images"] = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
            tensors[f"{split}.labels"] = torch.as_tensor(dataset.targets).long()
            classes = [str(name) for name in dataset.classes]
    return tensors, classes


def require_answer(urls: Sequence[str], seconds: float = ANSWER_SECONDS) -> None:
    """Return as soon as any host answers; `ConnectionError` with the error of each if none does in time.

    Name servers and hosts with several addresses take a multiple of a socket's timeout, so threads send the requests, and are not waited
    for.
    """
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    for url in urls:
        threading.Thread(target=lambda url=url: answers.put(_answer(url, seconds)), daemon=True).start()
    deadline = time.monotonic() + seconds
    answered = []
    with contextlib.suppress(queue.Empty):
        for _ in urls:
            answer = answers.get(timeout=max(deadline - time.monotonic(), 0))
            if not answer:
                return
            answered.append(answer)
    tried = "; ".join(answered) or f"no answer from {', '.join(map(_host, urls))} within {seconds:.0f} s"
    raise ConnectionError(tried)


def _answer(url: str, seconds: float) -> str:
    """An empty string if the host answers, and otherwise its name with the error."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=seconds).close()
    except HTTPError as error:  # a host that refuses the page has answered
        error.close()
    except Exception as error:
        return f"{_host(url)}: {getattr(error, 'reason', error)}"
    return ""


def _host(url: str) -> str:
    return urlsplit(url).hostname or url


@contextlib.contextmanager
def _stall_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
