"""Every model of timm as a backbone: `timm` with `model="resnet18"`, or `timm/resnet18`."""

from vitkit_timm.backbone import TimmBackbone, prepared

__all__ = ["TimmBackbone", "prepared"]
