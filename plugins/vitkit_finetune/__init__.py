"""Fine-tuning: a backbone to start from, the part of it that is trained, and what the result is worth."""

from vitkit_finetune.classifier import FineTuning, Tune
from vitkit_finetune.loss import CrossEntropy
from vitkit_finetune.mistakes import mistake_figures
from vitkit_finetune.start import classifier_on, start_from, training_images

__all__ = ["CrossEntropy", "FineTuning", "Tune", "classifier_on", "mistake_figures", "start_from", "training_images"]
