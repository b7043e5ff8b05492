"""What recipes that tests write have in common."""

CLASSIFIER = '''
class Classifier(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head
    def forward(self, batch):
        return {"loss": torch.nn.functional.cross_entropy(self.head(batch["images"].flatten(1)), batch["labels"])}
'''
"""A head as a model that `run.fit` takes, for a recipe that has imported torch."""
