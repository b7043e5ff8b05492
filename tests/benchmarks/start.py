"""How long a start takes: `vitkit --help`, and from the command to the end of a run's first step, on the embedded digits.

Processor time of a fresh process with all it imports; on a machine that does nothing else it is about the wall's.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from .timing import Options, Row

RECIPE = '''"""A run that ends behind its first step."""
import torch
from vitkit import backbones


class Model(torch.nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.vit = backbones.build("vit", **arguments)

    def forward(self, batch):
        return {"loss": self.vit(batch["images"]).float().square().mean()}


def main(run):
    data = run.dataset("digits", default="digits").resized(32)
    train = data.train.stratified_subset(128, seed=0).batches(128, shuffle=True)
    model = Model(in_chans=1, embed_dim=192, depth=6, num_heads=3)
    for _ in run.fit(model, train, epochs=1, optimizer=torch.optim.AdamW(model.parameters())):
        pass
'''


def taken(*words: str) -> float:
    """Processor seconds, user and system, of `vitkit` with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "vitkit", *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(options: Options) -> list[Row]:
    assert os.name == "posix", "processor time of other processes is to be had on POSIX systems alone"
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "one_step.py"
        recipe.write_text(RECIPE, encoding="utf-8")
        run = ["run", str(recipe), "--device", "cpu", "--compile", "off", "--overwrite", "--out", f"{folder}/run"]
        help_ = [taken("--help") for _ in range(options.rounds)]
        first = [taken(*run) for _ in range(1 if options.quick else 2)]
    return [
        Row("any", "`vitkit --help`", f"{statistics.median(help_):.2f} s", wanted="≤ 0.3 s"),
        Row("any", "a run of one step, report included", f"{statistics.median(first):.1f} s", wanted="first step ≤ 10 s"),
    ]
