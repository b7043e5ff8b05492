"""`vitkit attend`: where a transformer looks in pictures, and what its tokens have in common, as one sheet."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitkit.cli.console import err, out
from vitkit.cli.inference import Device, print_left_out
from vitkit.errors import UsageError, printable
from vitkit.validation import at_least

if TYPE_CHECKING:
    from vitkit.data.preprocess import Preprocessing

SIDE = 192
"""Height in pixels of a picture in the sheet, at least that of the model's images."""


def attend(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="a directory that a run saved into, a registered backbone such as timm/NAME, or OWNER/NAME"),
    ],
    images: Annotated[list[str], typer.Argument(metavar="PICTURES", help="image files, a folder of them, or a dataset's name")],
    path: Annotated[Path, typer.Option("--out", "-o", help="the PNG file to write")] = Path("attention.png"),
    count: Annotated[int, typer.Option(help="number of pictures to show, the first ones")] = 8,
    weights: Annotated[str, typer.Option(help="of a registered backbone: auto (the published ones), none, or a file")] = "auto",
    img_size: Annotated[int | None, typer.Option(help="of a registered backbone: side of its images in pixels  [default: its own]")] = None,
    device: Device = "auto",
) -> None:
    """Show where the last block of a transformer attends in pictures, as one PNG sheet.

    A row holds a picture; its tokens as colours (their first three principal components over all pictures); the attention of the CLS
    token to each patch, as the mean over the heads of the last block, as rollout over all blocks, and in each head. A model without a
    CLS token shows the mean over all patches as queries.
    """
    import torch

    from vitkit.files import check_output
    from vitkit.hub import open_backbone
    from vitkit.models.attention import attention, principal_colours
    from vitkit.report import AttendedPicture, attention_sheet, is_sheet, write_sheet
    from vitkit.training.accelerator import resolve_device

    if path.suffix.lower() != ".png":
        raise UsageError(f"--out {printable(path)}: the file is a PNG; give a name that ends in .png")
    at_least(1, **{"--count": count})
    check_output(path, overwrite=True, is_ours=is_sheet, kind="an image that vitkit drew", option="--out")
    place = resolve_device(device)
    names, pictures, more = _read(images, count)
    if not pictures:
        raise UsageError("none of the pictures can be read")
    opened = open_backbone(model, weights=weights, **({} if img_size is None else {"img_size": img_size}))
    if opened.preprocessing is None:
        raise UsageError(f"{printable(model)} was saved without preprocessing, so the size of its images is unknown")
    backbone = opened.backbone.to(place)
    maps = [attention(backbone, _prepared(picture, opened.preprocessing).to(place)) for picture in pictures]
    colours = principal_colours(torch.cat([found.patches().cpu() for found in maps])).unflatten(1, maps[0].grid)
    rows = []
    for name, picture, found, coloured in zip(names, pictures, maps, colours, strict=True):
        by_caption: dict[str, Any] = {}
        if found.heads is not None:
            heads = found.head_maps()[0].cpu()
            by_caption["last block"] = heads.mean(dim=0)
            if found.rollout is not None:
                by_caption["rollout"] = found.rollout_map()[0].cpu()
            by_caption |= {f"head {number}": head for number, head in enumerate(heads, start=1)} if len(heads) > 1 else {}
        rows.append(AttendedPicture(name, _shown(picture, opened.preprocessing), coloured, by_caption))
    sheet = attention_sheet(rows)
    write_sheet(path, sheet)
    first = maps[0]
    if first.problem:
        err.print(printable(first.problem, 500))
    elif first.rollout is None:
        err.print("no rollout: not every block attends between all tokens")
    query = "from the CLS token" if first.has_cls else "from all patches, because there is no CLS token"
    noun = "picture" if len(rows) == 1 else "pictures"
    grid = f"{first.grid[0]}×{first.grid[1]} patches, {first.prefix} other tokens, {query}"
    out.print(f"{printable(path)}: {len(rows)} {noun}{f' of {more:,}' if more > len(rows) else ''}; {opened.origin}; {grid}")


def _read(words: list[str], count: int) -> tuple[list[str], list[Any], int]:
    """Names and pictures of the first `count` that can be read, and the number of all."""
    from vitkit.models.image_sources import DatasetSplit, Files, find_source, open_image

    source = find_source(words)
    print_left_out(source.left_out)
    if isinstance(source, DatasetSplit):
        shown = min(count, len(source))
        import torch

        chosen = source.images.index_select(0, torch.arange(shown))
        return [source.name(index) for index in range(shown)], list(chosen.split(1)), len(source)
    assert isinstance(source, Files)
    names: list[str] = []
    pictures: list[Any] = []
    for file in source.paths:
        if len(pictures) == count:
            break
        try:
            pictures.append(open_image(file))
            names.append(file.name)
        except UsageError as error:
            print_left_out([str(error)])
    return names, pictures, len(source)


def _prepared(picture: Any, preprocessing: "Preprocessing") -> Any:
    """The picture as the model takes it `(1 c h w)`."""
    import torch

    from vitkit.data.preprocess import preprocess

    return preprocess(picture if isinstance(picture, torch.Tensor) else [picture], preprocessing)


def _shown(picture: Any, preprocessing: "Preprocessing") -> Any:
    """The part of the picture that the model sees, in colour, `(3 h w)` in [0, 1], enlarged to the height of the sheet."""
    _, height, width = preprocessing.shape
    scale = max(1, -(-SIDE // height))
    plain = replace(preprocessing, shape=(3, height, width), mean=(0.0,) * 3, std=(1.0,) * 3)
    if preprocessing.fit == "pad":
        return _prepared(picture, plain)[0].repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    return _prepared(picture, replace(plain, shape=(3, height * scale, width * scale)))[0].clamp(0, 1)


__all__ = ["attend"]
