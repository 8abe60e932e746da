"""Media of a request: from a path, URL or bytes to the patch rows a vision tower reads, within a policy.

Knows nothing about prompts, models or HTTP services.
"""

from mdi.media.fetch import fetch
from mdi.media.image import Patches, PatchSpec, decode_image, image_patches, load_image, smart_resize
from mdi.media.policy import MediaPolicy
from mdi.media.video import Video, VideoSpec, open_video, video_patches

__all__ = [
    "MediaPolicy",
    "PatchSpec",
    "Patches",
    "Video",
    "VideoSpec",
    "decode_image",
    "fetch",
    "image_patches",
    "load_image",
    "open_video",
    "smart_resize",
    "video_patches",
]
