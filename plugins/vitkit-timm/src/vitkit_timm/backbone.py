"""timm's models behind vitkit's contract of a backbone."""

from dataclasses import replace
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import timm
from huggingface_hub import constants, try_to_load_from_cache
from torch import Tensor, nn

from vitkit.data import ImageDataset, Preprocessing
from vitkit.errors import UnknownNameError, UsageError, VitkitError, nearest
from vitkit.registry import Spec

WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir")
"""Arguments of timm's `create_model` for the source of weights: they are no architecture."""
ANSWER_SECONDS = 6.0
"""Time to wait for an answer of the Hub."""


class TimmBackbone(nn.Module):
    """Any model of timm, `model`, without its classifier: images `(b c h w)` → tokens `(b n d)`.

    A transformer's tokens come as they are, class and register tokens in front; a convolutional network's last feature map
    is flattened in row-major order. `encode_image` gives timm's own pooled features `(b d)`, or the mean over tokens where
    its head would widen them first (as MobileNetV3's does; those layers then stay unused).

    - `model`: a name of `timm.list_models()`, with a tag for certain weights, such as "vit_tiny_patch16_224.augreg_in21k".
    - `pretrained`: load the weights that timm publishes, from the Hugging Face Hub or its cache.
    - `img_size`: pixels, where the model is built for a size (None: its own); convolutional networks take any.
    - `in_chans`: channels; pretrained filters are summed or repeated to fit.
    - further arguments go to timm's `create_model`.

    `preprocessing` is the size and normalisation of images that the weights expect. A Spec never names pretrained weights: a saved
    model holds its own, and loading it must not download. So a saved model may set timm's arguments that are numbers or flags,
    and the names of its layers and of its pooling, but no others. Raises `UnknownNameError` for a model that timm does not have,
    `UsageError` for arguments that it does not take and for images of another shape, `VitkitError` for weights that are not
    available.
    """

    vitkit_architecture: ClassVar = {
        "model": r"[a-z0-9_]+(\.[a-z0-9_]+)?",
        "global_pool": r"[a-z]*",
        **dict.fromkeys(("act_layer", "norm_layer", "aa_layer", "weight_init", "block_fn", "rope_type"), r"[a-z0-9_]*"),
        "**": Any,  # numbers, flags and lists of these
    }

    def __init__(
        self, model: str, *, pretrained: bool = False, img_size: int | None = None, in_chans: int = 3, **arguments: Any
    ) -> None:
        super().__init__()
        _check_name(model)
        self.model = _create(model, pretrained, img_size, {**arguments, "in_chans": in_chans, "num_classes": 0})
        config = self.model.pretrained_cfg or {}
        _, height, width = config.get("input_size") or (3, 224, 224)
        size = (height, width) if img_size is None else (img_size, img_size)
        self.img_size: tuple[int, int] = size
        self.in_chans = in_chans
        self.embed_dim: int = self.model.num_features
        self.widens: bool = getattr(self.model, "head_hidden_size", None) not in (None, self.embed_dim)
        mean, std = (_fitted(config.get(name) or default, in_chans) for name, default in _MOMENTS.items())
        self.preprocessing = Preprocessing((in_chans, *size), mean, std, "resize")

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"model": "test_vit", "img_size": 32}, {}

    @property
    def spec(self) -> Spec | None:
        """The Spec that builds the backbone again, without its pretrained weights."""
        return getattr(self, "_spec", None)

    @spec.setter
    def spec(self, spec: Spec) -> None:
        self._spec = replace(spec, kwargs={key: value for key, value in spec.kwargs.items() if key not in WEIGHTS})

    def forward(self, x: Tensor) -> Tensor:
        """Images `(b c h w)` → tokens `(b n d)`."""
        return self._tokens(self._features(x))

    def encode_image(self, x: Tensor) -> Tensor:
        """Images `(b c h w)` → pooled features `(b d)`."""
        features = self._features(x)
        if self.widens:
            return self._tokens(features).mean(dim=1)
        return self.model.forward_head(features, pre_logits=True).float()

    def _features(self, x: Tensor) -> Any:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise UsageError(
                f"images are {tuple(x.shape)}, expected (batch, {self.in_chans}, height, width); build the backbone with "
                f"their in_chans"
            )
        try:
            return self.model.forward_features(x)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"timm's {type(self.model).__name__} does not take images {tuple(x.shape)}: {error}; it was built for "
                f"{self.img_size[0]}×{self.img_size[1]} pixels, img_size builds it for another size"
            ) from error

    def _tokens(self, features: Any) -> Tensor:
        if not isinstance(features, Tensor) or not 2 <= features.ndim <= 4:
            raise UsageError(f"timm's {type(self.model).__name__} gives {type(features).__name__}, no tokens or feature map")
        if features.ndim == 2:
            features = features[:, None]  # (b d) → (b 1 d)
        elif features.ndim == 4 and getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            features = features.flatten(1, 2)  # (b h w d) → (b n d)
        elif features.ndim == 4:
            features = features.flatten(2).mT  # (b d h w) → (b n d)
        return features.float()


_MOMENTS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def prepared(dataset: ImageDataset, backbone: TimmBackbone) -> ImageDataset:
    """The dataset with images resized and normalised as the backbone's weights expect.

    Raises `UsageError` if their numbers of channels differ.
    """
    if dataset.shape[0] != backbone.in_chans:
        raise UsageError(
            f"{dataset.name} has {dataset.shape[0]} channels, the backbone takes {backbone.in_chans}; build it with "
            f"in_chans={dataset.shape[0]}"
        )
    return dataset.with_preprocessing(backbone.preprocessing)


def _check_name(model: str) -> None:
    name = model.partition(".")[0]
    if not timm.is_model(name):
        names = timm.list_models()
        raise UnknownNameError(
            f"timm {timm.__version__} has no model named {name!r}{nearest(name, names) or ';'} it has {len(names):,}; "
            f"timm.list_models('*{name[:6]}*') lists models with these letters"
        )


def _create(model: str, pretrained: bool, img_size: int | None, arguments: dict[str, Any]) -> Any:
    sized = arguments if img_size is None else {**arguments, "img_size": img_size}
    try:
        if pretrained:
            _require_answer(model)
        return timm.create_model(model, pretrained=pretrained, **sized)
    except TypeError as error:
        if img_size is not None and "img_size" in str(error):  # a model that takes images of any size
            return _create(model, pretrained, None, arguments)
        raise UsageError(f"timm cannot build {model!r}: {error}; see timm.create_model for its arguments") from error
    except Exception as error:
        if pretrained:
            raise VitkitError(
                f"the pretrained weights of timm's {model!r} are not available: {type(error).__name__}: {error}; they come from "
                f"huggingface.co/timm. Check the network; or download them elsewhere (`hf download timm/{model}`) and set "
                f"HF_HOME to that cache; or load a file of weights (on the command line --weights FILE); or leave pretrained "
                f"out for random weights (--weights none)"
            ) from error
        raise UsageError(f"timm cannot build {model!r}: {type(error).__name__}: {error}") from error


def _require_answer(model: str) -> None:
    """`ConnectionError` within seconds where neither the Hub's cache has the weights nor the Hub answers: timm would try for a minute."""
    config = timm.get_pretrained_cfg(model)
    repository = getattr(config, "hf_hub_id", None)
    files = ("model.safetensors", "pytorch_model.bin")
    cached = (try_to_load_from_cache(repository, file, cache_dir=constants.HF_HUB_CACHE) for file in files if repository)
    if not repository or any(isinstance(path, str) for path in cached):
        return
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set, and the weights are not in the cache of the Hub")
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=ANSWER_SECONDS).close()
    except HTTPError as error:  # a host that refuses the page has answered
        error.close()
    except OSError as error:
        raise ConnectionError(f"{constants.ENDPOINT} does not answer: {getattr(error, 'reason', error)}") from None


def _fitted(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Three channels' moments for another number of channels: their mean for each."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


__all__ = ["TimmBackbone", "prepared"]
