"""open_clip's text towers as a backbone: `openclip_text`."""

from vitkit_openclip.text import OpenCLIPText

__all__ = ["OpenCLIPText"]
