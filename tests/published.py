"""Reference models of other libraries: weights that leave no part of a model without influence, and their files."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in evaluation mode with weights of the size that keeps activations, biases and gains that are not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            mean = 0.0 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim < 2 else fan**-0.5) + mean)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module.eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(folder: Path, state: dict[str, Tensor]) -> Path:
    """A safetensors file of a state dict."""
    file = folder / "weights.safetensors"
    save_file({name: value.clone().contiguous() for name, value in state.items()}, file)
    return file


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the expected values' size, and not constant."""
    expected = expected.detach()
    assert expected.std() > 1e-2 * expected.abs().max()
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))
