"""open_clip's text towers behind vitkit's contract of a backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from vitkit.errors import UnknownNameError, UsageError, VitkitError, nearest
from vitkit.registry import Spec

SMALLEST_IMAGE_TOWER = {"image_size": 32, "patch_size": 32, "layers": 1, "width": 64}
"""The image tower that open_clip builds beside a text tower of random weights; it is not kept."""

OTHER_TOWERS = ("hf_model_name", "hf_tokenizer_name", "no_causal_mask", "embed_cls")
"""Entries of open_clip's text configuration that make another tower, or one with a tokenizer from the Hub."""


class OpenCLIPText(nn.Module):
    """The text tower of a CLIP of open_clip: token ids `(b l)` → tokens `(b l d)` in the space shared with images.

    `encode_text(list of str)` gives open_clip's own text features `(b d)`, not normalised: the token at a text's end behind
    the last norm and the projection, which the tokens of the call pass through too. Texts of a batch are padded to the
    longest of them rather than to the whole context; the mask is causal, so this changes nothing.

    - `model`: a name of `open_clip.list_models()` whose text tower is CLIP's own: causal, its tokenizer in open_clip.
    - `pretrained`: a tag of `open_clip.list_pretrained_tags_by_model(model)`, whose weights come from the Hugging Face Hub or
      its cache, or the path of a checkpoint file; None: weights drawn by torch's global generator.
    - `frozen`: its parameters need no gradient.
    - `quick_gelu`: x·σ(1.702 x) for GELU; None: as the weights were trained; for a file, or without weights, as the model says.
    - `text_cfg`: overrides of open_clip's text configuration, such as {"layers": 2}; only with `pretrained=None`.

    `context_length` counts tokens, the two at a text's ends among them. A Spec never asks for pretrained weights: a saved
    model holds its own, and loading it must not download.

    Raises `UnknownNameError` for a model or tag that open_clip does not have, `UsageError` for a tower of another kind, for
    ids that are no int64 `(b l)`, an empty text and one longer than the context, and `VitkitError` for weights that are not
    available.

    Source: Radford et al., arXiv 2103.00020; open_clip.
    """

    vitkit_architecture: ClassVar = {
        "model": r"[\w.-]+",
        "text_cfg": {r"context_length|vocab_size|width|heads|layers": int, r"mlp_ratio|ls_init_value": float | None},
    }

    def __init__(
        self,
        *,
        model: str = "ViT-B-32",
        pretrained: str | None = "openai",
        frozen: bool = True,
        quick_gelu: bool | None = None,
        text_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        config = _config(model)
        if pretrained is not None and text_cfg:
            raise UsageError(
                f"text_cfg is {dict(text_cfg)!r}, but pretrained={pretrained!r} fixes the tower; leave one of them out"
            )
        if quick_gelu is None:
            tag = open_clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
            quick_gelu = bool(tag.get("quick_gelu", config.get("quick_gelu", False)))
        self.quick_gelu = quick_gelu
        if pretrained is None:
            self.tower = _random(model, config, quick_gelu, text_cfg or {})
        else:
            self.tower = _pretrained(model, pretrained, quick_gelu)
        self.embed_dim: int = self.tower.width if self.tower.text_projection is None else self.tower.output_dim
        self.context_length: int = self.tower.context_length
        self.vocab_size: int = self.tower.vocab_size
        self._tokenizer = open_clip.get_tokenizer(model)
        if frozen:
            self.requires_grad_(False)

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        small = {"layers": 1, "width": 32, "heads": 2}
        ids = torch.randint(1, 40_000, (samples, 7))
        return {"pretrained": None, "frozen": False, "text_cfg": small}, {"ids": ids}

    @property
    def spec(self) -> Spec | None:
        """The Spec that builds the tower again, without its pretrained weights."""
        return getattr(self, "_spec", None)

    @spec.setter
    def spec(self, spec: Spec) -> None:
        self._spec = replace(spec, kwargs={**spec.kwargs, "pretrained": None, "quick_gelu": self.quick_gelu})

    def forward(self, ids: Tensor) -> Tensor:
        """Ids int64 `(b l)`, of which a 0 is padding → projected tokens `(b l d)`."""
        return self._projected(self._tokens(ids))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts → features `(b d)`."""
        ids = self.tokenize(texts).to(self.tower.positional_embedding.device)
        pooled = text_global_pool(self._tokens(ids), ids, self.tower.pool_type, eos_token_id=self.tower.eos_id)  # (b w)
        return self._projected(pooled)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts → ids int64 `(b l)`, padded with 0 to the l ids of the longest text; errors are those of the class."""
        if isinstance(texts, str):
            raise UsageError(f"encode_text takes a list of texts; given one text, {texts!r:.80}: put it into a list")
        if not texts:
            return torch.zeros(0, 1, dtype=torch.int64)
        lengths = [self._length(text) for text in texts]
        return self._tokenizer(list(texts), context_length=self.context_length)[:, : max(lengths)]

    def _length(self, text: str) -> int:
        """A text's tokens, with those at its ends."""
        if not text.strip():
            raise UsageError(f"the caption {text!r:.80} holds no word; give some text")
        length = len(self._tokenizer.encode(text)) + 2
        if length > self.context_length:
            raise UsageError(
                f"the caption {text!r:.80} has {length} tokens, the two at its ends among them; this text encoder reads "
                f"{self.context_length} at most: shorten it"
            )
        return length

    def _tokens(self, ids: Tensor) -> Tensor:
        """Ids `(b l)` → tokens `(b l w)` behind the last norm."""
        tower, length = self.tower, ids.shape[-1]
        if ids.ndim != 2 or ids.dtype != torch.int64 or not 1 <= length <= self.context_length:
            raise UsageError(
                f"ids are {ids.dtype} {tuple(ids.shape)}; expected int64 (texts, 1 to {self.context_length} tokens)"
            )
        # The tower's own call takes only texts of the full context length.
        tokens = tower.token_embedding(ids) + tower.positional_embedding[:length]
        tokens = tower.transformer(tokens, attn_mask=tower.attn_mask[:length, :length])
        return tower.ln_final(tokens)

    def _projected(self, tokens: Tensor) -> Tensor:
        """`(… w)` → `(… d)`."""
        projection = self.tower.text_projection
        if projection is None:
            return tokens
        return projection(tokens) if isinstance(projection, nn.Linear) else tokens @ projection


def _config(model: str) -> dict[str, Any]:
    config = open_clip.get_model_config(model)
    if config is None:
        names = open_clip.list_models()
        raise UnknownNameError(
            f"open_clip {open_clip.__version__} has no model named {model!r}{nearest(model, names) or ';'} it has "
            f"{len(names):,}: open_clip.list_models()"
        )
    if any(config["text_cfg"].get(name) for name in OTHER_TOWERS):
        raise UsageError(
            f"the text tower of {model!r} is not CLIP's causal one, or its tokenizer does not ship with open_clip; take a model "
            f"such as 'ViT-B-32' or 'ViT-L-14'"
        )
    return config


def _text_of(model: str, pretrained: str | None, quick_gelu: bool, **config: Any) -> Any:
    # open_clip compares the model's GELU with that of the weights before it reads further arguments: `force_quick_gelu` changes
    # the model's first. It can only switch quick GELU on, so `quick_gelu` is given as well.
    clip: Any = open_clip.create_model(
        model,
        pretrained=pretrained,
        force_quick_gelu=quick_gelu,
        force_custom_text=True,
        quick_gelu=quick_gelu,
        **config,
    )
    return clip.text


def _random(model: str, config: Mapping[str, Any], quick_gelu: bool, text_cfg: Mapping[str, Any]) -> Any:
    parts = {"vision_cfg": SMALLEST_IMAGE_TOWER, "text_cfg": {**config["text_cfg"], **text_cfg}}
    try:
        return _text_of(model, None, quick_gelu, **parts)
    except (TypeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"open_clip cannot build {model!r} with text_cfg={dict(text_cfg)!r}: {error}; its text configuration is "
            f"{config['text_cfg']!r}"
        ) from error


def _pretrained(model: str, pretrained: str, quick_gelu: bool) -> Any:
    try:
        return _text_of(model, pretrained, quick_gelu)
    except Exception as error:  # the Hub, the file and the weights raise many kinds
        tags = open_clip.list_pretrained_tags_by_model(model)
        source = open_clip.get_pretrained_cfg(model, pretrained)
        if not source and "not a known tag" in str(error):
            raise UnknownNameError(
                f"open_clip has no weights {pretrained!r} of {model!r}{nearest(pretrained, tags) or ';'} tags: "
                f"{', '.join(tags)}; or give the path of a checkpoint"
            ) from error
        hub = source.get("hf_hub", "").strip("/")
        where = f"huggingface.co/{hub}" if hub else source.get("url", pretrained)
        fetch = f" (`hf download {hub}`)" if hub else ""
        raise VitkitError(
            f"the weights {pretrained!r} of {model!r} are not available: {type(error).__name__}: {error}; tried {where} and its "
            f"cache. Check the network, or fetch them elsewhere{fetch} and let HF_HOME name that cache, or give the path of a "
            f"checkpoint as pretrained. The backbone 'text_transformer', trained from scratch, needs no weights"
        ) from error


__all__ = ["OpenCLIPText"]
