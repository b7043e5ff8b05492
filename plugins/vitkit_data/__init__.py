"""Built-in datasets: images from torchvision and scikit-learn, and a folder of your own images."""

from vitkit_data.builtin import cifar10, cifar100, digits, fashion_mnist, mnist
from vitkit_data.folder import image_folder

__all__ = ["cifar10", "cifar100", "digits", "fashion_mnist", "image_folder", "mnist"]
