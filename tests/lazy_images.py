"""Images that are read when they are asked for, over a tensor: `vitkit.contracts.LazyImages`."""

import torch


class Lazy:
    """Images of a tensor that are read one by one; those of `broken` rows cannot be."""

    def __init__(self, images, broken=(), skipped=None, locality=None):
        self.images, self.broken, self.skipped = images, set(broken), [] if skipped is None else skipped
        self.shape, self.dtype, self.ndim = tuple(images.shape), images.dtype, images.ndim
        self.locality = len(images) if locality is None else locality

    def __len__(self):
        return len(self.images)

    def read(self, shares):
        for share in shares:
            self.skipped += [f"row {row}" for row in share.tolist() if row in self.broken and f"row {row}" not in self.skipped]
            kept = share[torch.tensor([row not in self.broken for row in share.tolist()], dtype=torch.bool)]
            yield self.images[kept], kept

    def index_select(self, dim, index):
        return self.images.index_select(dim, index)

    def subset(self, rows):
        return Lazy(self.images[rows], [place for place, row in enumerate(rows.tolist()) if row in self.broken], self.skipped)

    def order(self, generator, size):
        return torch.randperm(len(self), generator=generator)
