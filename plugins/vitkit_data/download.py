"""Published datasets through torchvision, and soon an error where there is no network."""

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
"""How long to wait for any answer at all: without a network a recipe should fall back soon."""
STALL_SECONDS = 20.0
"""How long a download under way may stand still."""


def download(name: str) -> tuple[dict[str, Tensor], list[str]]:
    """A class of `torchvision.datasets` in the store's form: tensors and class names."""
    from torchvision import datasets as published

    factory: Any = getattr(published, name)
    require_answer(getattr(factory, "mirrors", None) or [factory.url])
    tensors: dict[str, Tensor] = {}
    classes: list[str] = []
    with tempfile.TemporaryDirectory() as folder, _stalls_end(), contextlib.redirect_stdout(io.StringIO()):
        for split in ("train", "test"):
            found = factory(folder, train=split == "train", download=True)
            pixels = torch.as_tensor(found.data)
            # (n h w) of grey images, (n h w c) of coloured ones → (n c h w)
            tensors[f"{split}.images"] = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
            tensors[f"{split}.labels"] = torch.as_tensor(found.targets).long()
            classes = [str(name) for name in found.classes]
    return tensors, classes


def require_answer(urls: Sequence[str], seconds: float = ANSWER_SECONDS) -> None:
    """Return once any host answers anything; `ConnectionError` with what each said where none does in time.

    Name servers and hosts with several addresses take a multiple of a socket's timeout, so the asking is done in
    threads that are left behind.
    """
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    for url in urls:
        threading.Thread(target=lambda url=url: answers.put(_answer(url, seconds)), daemon=True).start()
    deadline = time.monotonic() + seconds
    said = []
    with contextlib.suppress(queue.Empty):
        for _ in urls:
            answer = answers.get(timeout=max(deadline - time.monotonic(), 0))
            if not answer:
                return
            said.append(answer)
    tried = "; ".join(said) or f"no answer from {', '.join(map(_host, urls))} within {seconds:.0f} s"
    raise ConnectionError(tried)


def _answer(url: str, seconds: float) -> str:
    """An empty string where the host answers, and otherwise its name with what went wrong."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=seconds).close()
    except HTTPError as error:  # a host that refuses this page is a host that answers
        error.close()
    except Exception as error:
        return f"{_host(url)}: {getattr(error, 'reason', error)}"
    return ""


def _host(url: str) -> str:
    return urlsplit(url).hostname or url


@contextlib.contextmanager
def _stalls_end() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
