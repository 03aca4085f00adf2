"""`data:` what is trained on."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from entrecipes.recipe.base import PositiveCount, Section, register, splits_revision, union


class Data(Section):
    """Keys that every source understands."""

    kind: ClassVar[str] = "images"
    """What the source holds: `images`, `sequences` or `clips`; a model denoises one kind."""

    held_out: float = Field(0.1, ge=0, lt=1)
    """Share of the images (or of the symbols) kept from training and used for evaluation."""
    split_seed: int = Field(0, ge=0)
    """Seed of the train/held-out split (independent of the training seed, so that seeds share one held-out set)."""
    max_images: PositiveCount | None = None
    """Use only that many images, drawn by `split_seed` (sequences: that many training windows)."""


class ImageData(Data):
    """Keys that every image source understands."""

    image_size: int | None = Field(None, gt=0)
    """Side of the square that images are resized (short side) and centre-cropped to, in pixels; null: the model's
    sample size times its VAE's factor."""
    channels: Literal[1, 3, None] = None
    """1 for grey, 3 for colour; null: what the model takes."""
    horizontal_flip: bool = False
    """Mirror each training image with probability one half."""
    binarize: bool = False
    """Make every pixel black or white, whichever is nearer: discrete data. Sets kept in memory only."""


class DecodedImageData(ImageData):
    """Keys of the sources that decode image files."""

    on_device: Literal["auto", "always", "never"] = "auto"
    """Keep all images as uint8 on the training device; auto: when they fit in 2 GiB."""
    num_workers: int = Field(2, ge=0)
    """Decoding processes when the images are not kept on the device."""
    max_bad_images: int = Field(10, ge=0)
    """Unreadable images that are named and skipped; one more is an error."""


@register("data", implementation="entrecipes.data.digits:load")
class DigitsData(ImageData):
    """scikit-learn's handwritten digits: 1,797 real 8x8 grey images, 10 classes, no download."""

    type: Literal["digits"] = "digits"


@register("data", implementation="entrecipes.data.folder:load")
class FolderData(DecodedImageData):
    """A folder of images: class sub-folders, or labels and captions from metadata.jsonl (the imagefolder layout)."""

    type: Literal["folder"] = "folder"
    path: str
    """The folder, relative to the working directory."""
    label_column: str | None = "label"
    """Column with the class (null: unconditional); class sub-folders give `label`."""
    caption_column: str | None = None
    """Column with the caption."""


@register("data", implementation="entrecipes.data.hub:load")
class HubData(DecodedImageData):
    """Any image data set of the Hugging Face Hub, streamed or downloaded."""

    type: Literal["hub"] = "hub"
    id: str
    """Data set id, such as `ylecun/mnist` (with `@revision` if need be), or a local datasets folder."""
    config: str | None = None
    """Name of the data set's configuration."""
    split: str = "train"
    """Split to train on (the held-out part is cut from it, unless `held_out_split` is given)."""
    held_out_split: str | None = None
    """Split to hold out as it is."""
    revision: str | None = None
    """Branch, tag or commit."""
    streaming: bool = False
    """Read while training in place of downloading first; the first images of the stream are held out."""
    shuffle_buffer: int = Field(1000, ge=1)
    """Streaming only: images in the shuffle buffer."""
    image_column: str = "image"
    """Column with the image."""
    label_column: str | None = "label"
    """Column with the class (null: unconditional)."""
    caption_column: str | None = None
    """Column with the caption."""

    _split = splits_revision("id")

    @model_validator(mode="after")
    def _stream_or_keep(self) -> HubData:
        if self.streaming and self.on_device == "always":
            raise ValueError("on_device: a stream can't be kept on the device; leave it out or set streaming: false")
        return self


@register("data", implementation="entrecipes.data.prepared:load")
class PreparedData(DecodedImageData):
    """A data set built on this machine from package registries by `entrecipes data prepare NAME`."""

    type: Literal["prepared"] = "prepared"
    name: str
    """One of `entrecipes data ls`."""
    label_column: str | None = "label"
    """Column with the class (null: unconditional)."""
    caption_column: str | None = None
    """Column with the caption."""


class WindowData(Data):
    """Keys of the sources of symbols."""

    kind: ClassVar[str] = "sequences"

    length: int | None = Field(None, gt=0)
    """Symbols in a window; null: the model's sample size."""
    stride: PositiveCount | None = None
    """Symbols from the start of one training window to the next; null: the length, so that windows do not overlap."""
    label_column: str | None = "label"
    """Column with the class, where the set has one and the model takes classes (null: unconditional)."""


@register("data", implementation="entrecipes.data.sequences:load")
class SequenceData(WindowData):
    """Windows of symbols (text, DNA), one-hot for the model: the embedded `pride`, or a prepared set of sequences."""

    type: Literal["sequences"] = "sequences"
    name: str = "pride"
    """`pride` (65 kB of text, no download), a prepared set of sequences (`austen`, `dna`, `splice`), or a text file
    `NAME.txt`, of which letters and spaces are kept."""


@register("data", implementation="entrecipes.data.hub_sequences:load")
class HubSequenceData(WindowData):
    """Sequences of symbols in a column of any data set of the Hugging Face Hub, one example a row."""

    type: Literal["hub_sequences"] = "hub_sequences"
    id: str
    """Data set id (with `@revision` if need be), or a local datasets folder."""
    config: str | None = None
    """Name of the data set's configuration."""
    split: str = "train"
    """Split to train on; the held-out part is drawn from it."""
    revision: str | None = None
    """Branch, tag or commit."""
    sequence_column: str = "sequence"
    """Column with the sequences. Rows with symbols outside the model's alphabet, such as N in DNA, are left out."""

    _split = splits_revision("id")


class VideoData(Data):
    """Keys of the sources of clips of people with their poses. A clip counts as one image."""

    kind: ClassVar[str] = "clips"

    image_size: int = Field(ge=8)
    """Side of the square that frames are resized (short side) and centre-cropped to, in pixels."""
    frames: int = Field(8, ge=1)
    """Frames of a clip."""
    frame_step: int = Field(2, ge=1)
    """Frames of the video from one frame of a clip to the next."""
    clip_step: PositiveCount | None = None
    """Frames of the video from the start of one clip to the next; null: half of what a clip spans."""
    videos: tuple[str, ...] = Field(("*",), min_length=1)
    """Patterns of the names of the videos to train on, such as `walk/*` or `*/view0`."""
    held_out_videos: tuple[str, ...] | None = Field(None, min_length=1)
    """Patterns of the names of the videos to hold out; null: the share `held_out` of the clips, in whole motions (all
    videos of one name before the slash; of `video_folder`, in whole videos). Either way clips of one video never land
    on both sides."""
    reference: Literal["outside", "first"] = "outside"
    """The image that shows how the person looks: `outside`, a frame of the same video that is not in the clip (one in
    it where the video has no other), drawn by `split_seed`; `first`, the clip's first frame."""
    min_visibility: float = Field(0.5, ge=0, le=1)
    """Mean visibility of the joints below which a frame counts as without pose, and its clips as bad."""
    min_motion: float = Field(0.5, ge=0)
    """Mean difference between a clip's successive frames, in grey levels of 255, below which it counts as still, and
    bad."""
    max_bad_clips: int = Field(50, ge=0)
    """Bad clips (too short, without poses, still, undecodable) that are named and skipped; one more is an error."""


@register("data", implementation="entrecipes.data.clips:load")
class ClipsData(VideoData):
    """Clips of people with poses, built by `entrecipes data prepare`: rendered motion capture, or real videos."""

    type: Literal["clips"] = "clips"
    name: str = "mocap"
    """`mocap`, `people`, or a folder that `entrecipes data prepare --output` made."""


@register("data", implementation="entrecipes.data.video_folder:load")
class VideoFolderData(VideoData):
    """A folder of your own videos (.mp4, .webm, .gif ...), with NAME.poses.json beside each or a metadata.jsonl."""

    type: Literal["video_folder"] = "video_folder"
    path: str
    """The folder, relative to the working directory."""
    crop: Literal["centre", "person"] = "centre"
    """What is cut out of each frame: the square in its middle, or one that follows the person."""


class StickerKeys(Data):
    """Keys of the sources of captioned clips, such as stickers. A clip counts as one image."""

    kind: ClassVar[str] = "stickers"

    image_size: int | None = Field(None, ge=8)
    """Side of the square that frames are resized to, in pixels; null: what the model takes."""
    frames: int = Field(8, ge=2)
    """Frames of a clip."""
    max_bad_clips: int = Field(50, ge=0)
    """Clips that can't be used (undecodable, too short), which are named and skipped; one more is an error."""


@register("data", implementation="entrecipes.data.stickers:load")
class StickersData(StickerKeys):
    """Animated and static stickers with captions: the embedded set (32 px, no download), or a prepared folder."""

    type: Literal["stickers"] = "stickers"
    name: str = "stickers"
    """`stickers`, the embedded set, or a folder that `scripts/prepare_stickers.py` made."""
    static: bool = True
    """Train on still stickers, too: clips of one frame."""
    groups: tuple[str, ...] = Field(("*",), min_length=1)
    """Patterns of the groups to take, such as `Animals*`."""
    on_device: Literal["auto", "always", "never"] = "auto"
    """Keep all clips as uint8 on the training device; auto: when they fit in 2 GiB."""
    num_workers: int = Field(2, ge=0)
    """Decoding processes when the clips are not kept on the device."""


@register("data", implementation="entrecipes.data.captioned_clips:load")
class CaptionedClipsData(StickerKeys):
    """A prepared set of videos (`mocap`, `people`) as captioned clips, to pre-train a text-to-video model on."""

    type: Literal["captioned_clips"] = "captioned_clips"
    name: str = "mocap"
    """A set of `entrecipes data ls`, or a folder that `entrecipes data prepare --output` made."""
    frame_step: int = Field(2, ge=1)
    """Frames of the video from one frame of a clip to the next."""
    clip_step: PositiveCount | None = None
    """Frames of the video from the start of one clip to the next; null: half of what a clip spans."""
    videos: tuple[str, ...] = Field(("*",), min_length=1)
    """Patterns of the names of the videos to take, such as `walk/*`."""
    caption: str = "a video of a person doing a {motion}"
    """The text of a clip; {motion} is the video's name before the slash, with spaces for underscores."""


DataSection = union("data")
