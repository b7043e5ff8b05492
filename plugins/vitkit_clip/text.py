"""The text tower: a small transformer over words, trained from scratch."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit_vit import Block

PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def words_of(text: str) -> list[str]:
    """A text's words in lower case: runs of letters and digits; punctuation and underscores separate them."""
    return _WORD.findall(text.lower())


def vocabulary_of(texts: Iterable[str]) -> list[str]:
    """The words of all texts, each once, sorted."""
    return sorted({word for text in texts for word in words_of(text)})


class TextTransformer(nn.Module):
    """Token ids of words `(b l)` → tokens `(b l d)`, zero where there is padding.

    The vocabulary is a list of words. Id 0 is padding, 1 is any word that is not in the vocabulary, and i + 2 is word i.
    The model has learned positions, `depth` pre-norm blocks without a causal mask, and a last layer norm. Texts of one
    length go through the blocks together, so that padding takes no part. `encode_text(list of str)` gives the mean over a
    text's tokens `(b d)`.

    `words_of` splits texts into words. `embed_dim`, `context_length` (the most words of a text) and `vocabulary` are
    attributes. Weights are drawn from Normal(0, 0.02) by torch's global generator. Raises `UsageError` if the vocabulary is
    empty or repeats a word, dimensions do not fit, or an id is outside the vocabulary; and if a text is empty, longer than
    `context_length`, or has no word of the vocabulary.
    """

    vitkit_architecture: ClassVar = {"vocabulary": _WORD.pattern}

    def __init__(
        self,
        *,
        vocabulary: Sequence[str],
        embed_dim: int = 128,
        depth: int = 2,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        context_length: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.vocabulary = list(vocabulary)
        wrong = [word for word in self.vocabulary if words_of(word) != [word]]
        if not self.vocabulary or len(set(self.vocabulary)) < len(self.vocabulary) or wrong:
            raise UsageError(
                f"vocabulary has {len(self.vocabulary)} entries{f', among them {wrong[0]!r}' if wrong else ''}; expected at "
                f"least one, each a single word in lower case and given once, e.g. from vocabulary_of(texts)"
            )
        if depth < 1 or num_heads < 1 or context_length < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise UsageError(
                f"embed_dim={embed_dim}, depth={depth}, num_heads={num_heads}, context_length={context_length}; expected at "
                f"least 1 each, and heads that divide embed_dim"
            )
        if not 0.0 <= dropout < 1.0:
            raise UsageError(f"dropout is {dropout}; expected a probability in [0, 1)")
        self.embed_dim, self.context_length = embed_dim, context_length
        self._ids = {word: number for number, word in enumerate(self.vocabulary, start=UNKNOWN + 1)}
        self.token_embed = nn.Embedding(len(self.vocabulary) + 2, embed_dim)
        self.positions = nn.Parameter(torch.empty(context_length, embed_dim))
        self.blocks = nn.Sequential(
            *(
                Block(embed_dim, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, attn_dropout=dropout, drop_path=0.0)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave out of weight decay."""
        return {"positions"}

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        vocabulary = ["sample", "0", "1", "2"]
        ids = torch.randint(UNKNOWN, len(vocabulary) + 2, (samples, 5))
        return {"vocabulary": vocabulary, "embed_dim": 16, "depth": 1, "context_length": 5}, {"ids": ids}

    def forward(self, ids: Tensor) -> Tensor:
        """Ids int64 `(b l)`, each row's padding at its end → tokens `(b l d)` after the last norm."""
        if ids.ndim != 2 or ids.dtype != torch.int64 or not 1 <= ids.shape[1] <= self.context_length:
            raise UsageError(
                f"ids are {ids.dtype} {tuple(ids.shape)}; expected int64 (texts, 1 to {self.context_length} words)"
            )
        if len(ids) and int(ids.max()) > len(self.vocabulary) + UNKNOWN:
            raise UsageError(
                f"ids run to {int(ids.max())}; this vocabulary has {len(self.vocabulary)} words, ids to "
                f"{len(self.vocabulary) + UNKNOWN}"
            )
        if bool(((ids[:, :-1] == PAD) & (ids[:, 1:] != PAD)).any()):
            raise UsageError(f"padding, id {PAD}, stands before a word; it belongs at the end of a row")
        lengths = (ids != PAD).sum(dim=1)
        parts, rows = [], []
        for length in lengths.unique().tolist():
            chosen = (lengths == length).nonzero().squeeze(1)
            tokens = self.token_embed(ids[chosen, :length]) + self.positions[:length]  # (b_length length d)
            tokens = self.blocks(tokens) if length else tokens
            tokens = self.norm(tokens.to(self.norm.weight.dtype))  # blocks may leave them in autocast's
            parts.append(nn.functional.pad(tokens, (0, 0, 0, ids.shape[1] - length)))
            rows.append(chosen)
        if not parts:
            return ids.new_zeros((*ids.shape, self.embed_dim), dtype=self.positions.dtype)
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts → the mean over each one's tokens `(b d)`."""
        ids = self.tokenize(texts).to(self.positions.device)
        return self.pool(self(ids), ids)

    def pool(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Tokens `(b l d)` and their ids `(b l)` → the mean over the tokens that are not padding `(b d)`."""
        return tokens.sum(dim=1) / (ids != PAD).sum(dim=1, keepdim=True).clamp(min=1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts → ids int64 `(b l)`, where l is the most words of a text; errors are those of the class."""
        if isinstance(texts, str):
            raise UsageError(f"encode_text takes a list of texts; given one text, {texts!r:.80}: put it into a list")
        rows = [self._numbers(text) for text in texts]
        longest = max(map(len, rows), default=1)
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], dtype=torch.int64).view(-1, longest)

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that are not in the vocabulary: all of them are one word to this model."""
        return [word for word in words_of(text) if word not in self._ids]

    def _numbers(self, text: str) -> list[int]:
        words = words_of(text)
        if not words:
            raise UsageError(f"the caption {text!r:.80} has no word; give some text")
        if len(words) > self.context_length:
            raise UsageError(
                f"the caption {_shortened(text)!r} has {len(words)} words; this text encoder reads {self.context_length} at most: "
                f"shorten it"
            )
        numbers = [self._ids.get(word, UNKNOWN) for word in words]
        if all(number == UNKNOWN for number in numbers):
            raise UsageError(
                f"the caption {text!r:.80} has no word of this text encoder's vocabulary; its {len(self.vocabulary)} words are "
                f"{', '.join(self.vocabulary[:12])}, ..."
            )
        return numbers


__all__ = ["TextTransformer", "vocabulary_of", "words_of"]


def _shortened(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
