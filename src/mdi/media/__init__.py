"""Media of a request: from a path, URL or bytes to the rows of patches a vision tower reads, within a policy."""

from mdi.core.config import MediaPolicy
from mdi.media.fetch import fetch
from mdi.media.image import decode_image
from mdi.media.patches import Patches, PatchSpec, image_patches, smart_resize, video_patches
from mdi.media.video import Video, open_video
from mdi.media.video_spec import TimedVideoSpec, VideoSpec
from mdi.media.work import AbandonedError, Memory, Turns, Work

__all__ = [
    "AbandonedError",
    "MediaPolicy",
    "Memory",
    "PatchSpec",
    "Patches",
    "TimedVideoSpec",
    "Turns",
    "Video",
    "VideoSpec",
    "Work",
    "decode_image",
    "fetch",
    "image_patches",
    "open_video",
    "smart_resize",
    "video_patches",
]
