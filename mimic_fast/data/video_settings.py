"""Which frames of a video are taken, and in what form they are kept."""

from typing import Literal

from pydantic import Field

from mimic_fast.config import Frozen


class FrameSettings(Frozen):
    """How frames are taken, thinned out, resized and written."""

    pick: Literal["interval", "every", "scenes"] = Field(
        default="interval",
        description="the first frame of every interval, every frame, or the first of every scene",
    )
    interval: float = Field(
        default=1.0, ge=1e-3, le=86_400, description="seconds between frames (pick 'interval')"
    )
    scene_threshold: float = Field(
        default=0.3,
        gt=0,
        lt=1,
        description="change from one frame to the next, 0..1, that begins a scene (pick 'scenes')",
    )
    drop_near_duplicates: bool = Field(
        default=True, description="drop a frame that looks like one of the last kept"
    )
    near_duplicate: float = Field(
        default=0.03,
        ge=0,
        lt=0.5,
        description="share of the difference hash's bits in which near-duplicates may differ",
    )
    compared: int = Field(
        default=16, ge=1, le=1024, description="how many of the last kept frames one is compared to"
    )
    short_side: int | None = Field(
        default=None, ge=2, le=8192, description="pixels of the shorter side; None: as it is"
    )
    upscale: bool = Field(default=False, description="also enlarge frames that are smaller")
    limit: int | None = Field(
        default=None, ge=1, description="frames kept of one video; None: no limit"
    )
    file_format: Literal["jpg", "png"] = Field(
        default="jpg", description="JPEG of quality 95, or PNG"
    )
    shard_frames: int | None = Field(
        default=None, ge=1, description="frames in one tar shard; None: a file for every frame"
    )
