"""Typed settings of the data: sources, order, decoding, augmentation, reading. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from tubelet.config import Settings, fixed, free, recorded
from tubelet.redact import secrets_in


class SourceSettings(Settings):
    """One source of samples: shards of one data set."""

    name: str = fixed("main")
    """Name of the source. It keys the random order (crc32 of the name), so renaming it is another order."""
    shards: str | list[str] = free()
    """Shards: path or URL with brace expansion (`x-{0000..0063}.tar`), a folder, a list, several joined by `::`.
    May move on resume: what must be equal is the index's fingerprint."""
    weight: float = fixed(1.0, gt=0)
    """Share of this source in the mixture, relative to the other sources' weights."""
    label: str = fixed("cls")
    """Where the label is: `cls`, `txt`, or `json:path.to.field`."""
    class_map: str | None = free(None)
    """JSON file {raw label: class number}, for labels that are not numbers already."""
    storage: dict[str, Any] = free({})
    """Options of the fsspec file system that remote shards are read through, e.g. {anon: true} or {endpoint_url: ...}.
    Secrets are refused here, since settings are printed and saved: they belong in the environment or credential files."""

    @field_validator("storage", mode="after")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        if found := secrets_in(value):
            raise ValueError(
                f"secrets ({', '.join(found)}) do not belong in settings, which are printed and saved with the run; give "
                "them by environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN) "
                "or credential files (~/.aws/credentials, ~/.netrc for https)")
        return value


class AugmentSettings(Settings):
    """What is done to a decoded sample while training; evaluation uses `eval_crop` alone."""

    crop: Literal["inception", "resmall", "resize", "jitter", "center", "none"] = recorded("inception")
    """`inception` = random area and aspect; `resmall` = short side to `resize` then random crop; `resize` = square
    resize to `resize` then random crop; `jitter` = short side uniform in `short_side` then random crop (SlowFast's);
    `center` = as in evaluation; `none` = images already have the right size."""
    scale: tuple[float, float] = recorded((0.05, 1.0))
    """Area range of the inception crop (big_vision: 0.05..1; torchvision's default: 0.08..1)."""
    ratio: tuple[float, float] = recorded((0.75, 4 / 3))
    """Aspect range of the inception crop."""
    resize: int | None = recorded(None, gt=0)
    """Pixels of the intermediate size for `resmall` and `resize`; null = round(img_size * 448 / 384)."""
    short_side: tuple[int, int] = recorded((256, 320))
    """Range of the short side in pixels for `jitter`."""
    crop_last: bool = recorded(False)
    """Flip and colours first, the crop last, so that its box refers to the picture as it is seen (token labeling)."""
    interpolation: Literal["bilinear", "bicubic", "nearest", "random"] = recorded("bicubic")
    """Resampling filter (antialiased); `random` = bilinear or bicubic by sample, as timm does (evaluation: bicubic)."""
    hflip: float = recorded(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    rand_augment: str | None = recorded(None)
    """timm's RandAugment string, e.g. `rand-m9-mstd0.5-inc1`; null = off. The frames of a clip get the same operations."""
    color_jitter: float = recorded(0.0, ge=0)
    """Strength of brightness, contrast and saturation jitter, as timm's; not together with `rand_augment`."""
    erasing: float = recorded(0.0, ge=0, le=1)
    """Probability of random erasing; of a clip a box over all frames (a cube)."""
    erasing_mode: Literal["pixel", "const"] = recorded("pixel")
    """`pixel` = noise of the pixels' mean and standard deviation, `const` = the mean (timm's zero after normalisation)."""
    erasing_count: int = recorded(1, ge=1)
    """Boxes at most that are erased."""
    mixup_alpha: float = recorded(0.0, ge=0)
    """Beta parameter of mixup; 0 = off."""
    cutmix_alpha: float = recorded(0.0, ge=0)
    """Beta parameter of cutmix; 0 = off."""
    mix_prob: float = recorded(1.0, ge=0, le=1)
    """Probability that a pair is mixed at all."""
    mix_switch_prob: float = recorded(0.5, ge=0, le=1)
    """Probability of cutmix when both are on."""
    mixtoken_alpha: float = recorded(0.0, ge=0)
    """Beta parameter of MixToken's boxes, which batches then carry as `mix_boxes`; 0 = off. Not with mixup or cutmix."""
    eval_crop: Literal["center", "resize"] = recorded("center")
    """Evaluation: `center` = short side to img_size / crop_pct then centre crop; `resize` = plain square resize."""


class ClipSettings(Settings):
    """Which frames of a video make a clip. A picture is a video of one frame, here and everywhere below."""

    frames: int = fixed(1, ge=1)
    """Frames T of a clip. 1 = batches [B, 3, H, W] for image models; more = [B, 3, T, H, W]."""
    sampling: Literal["window", "spread", "segments"] = recorded("window")
    """`window` = T frames exactly `stride` apart from a random start (ViViT, big_vision); `spread` = T frames evenly over
    T * `stride` ones from a random start (SlowFast, MViT, UniFormer); `segments` = one random frame of each of T equal parts
    of the whole video (TSN). Evaluation: clips at equal distances (`test_clips`), the middle of each part."""
    stride: float = recorded(1.0, gt=0)
    """Distance of the frames of `window` and `spread`, in `unit`s."""
    unit: Literal["frames", "seconds"] = recorded("frames")
    """`frames` = frames as they are in the file; `seconds` = by their time stamps, whatever the frame rate."""
    short: Literal["clamp", "loop", "refuse"] = recorded("clamp")
    """A video shorter than its window: repeat its last frame, begin again, or count it as a bad sample."""
    test_clips: int = free(1, ge=1)
    """Evaluation: clips per video, at equal distances; one is the middle."""
    test_crops: Literal[1, 3] = free(1)
    """Evaluation: 1 = centre crop; 3 = three crops along the longer side. Logits of all views are averaged."""


class CacheSettings(Settings):
    """Remote shards on the disk of a node, shared by all its processes."""

    folder: str | None = free(None)
    """Folder on a local disk; null = no cache, every sample is read by range."""
    limit_gb: float = free(100.0, gt=0)
    """Bytes (in units of 1e9) that the folder may hold; what was used longest ago goes first."""
    fetch: Literal["auto", "windows", "shards"] = free("auto")
    """What is fetched ahead: the shuffle `windows` of this node's lanes, each as its one or two byte ranges and dropped
    when passed; or whole `shards`, kept. `auto` = windows for sources that have them (above 4 M samples), else shards."""
    ahead: int = free(8, ge=1)
    """Global batches that the fetcher runs ahead."""
    connections: int = free(8, ge=1)
    """Transfers at the same time, per node."""


class DataSettings(Settings):
    """Training and validation data."""

    train: list[SourceSettings] = fixed(min_length=1)
    """Sources of the training mixture. A plain string stands for one source with that string as `shards`."""
    val: list[SourceSettings] = free([])
    """Validation sets, each read exactly once per evaluation; metrics are named `val/<name>/...` (one: `val/...`)."""
    clip: ClipSettings = ClipSettings()
    """Frames of a clip; leave it for pictures."""
    augment: AugmentSettings = AugmentSettings()
    """Training augmentation."""
    cache: CacheSettings = CacheSettings()
    """Remote shards on local disk."""
    token_labels: str | None = recorded(None)
    """Member with a picture's map of token labels (e.g. `tokens.npy`); batches then carry `token_labels`."""
    repeats: int = fixed(1, ge=1)
    """Repeated augmentation: this many neighbours in the order are the same sample, augmented apart."""
    lanes: int | None = fixed(None, gt=0)
    """Lanes of the order, a multiple of the global batch size; null = global_batch * ceil(4096 / global_batch), fixed
    at the first start of a run."""
    window: int | None = fixed(None, gt=0)
    """Shuffle window in samples for sources above 4 M samples; null = 32 MiB worth of samples, a power of 2."""
    shuffle: bool = fixed(True)
    """False reads shards in index order (for debugging; batches are still laned)."""
    restart_order: bool = free(False)
    """On resume, accept data whose fingerprint differs and start its order anew at sample 0, once: later starts with the
    same data go on from there. A fork (`init.from_run`) always starts anew."""
    index_dir: str | None = free(None)
    """Folder for indexes that do not lie beside their shards; null = the user's cache folder."""
    decoder: Literal["torchvision", "simplejpeg", "pil"] = recorded("torchvision")
    """JPEG decoder; named with its version in the run, never switched silently."""
    reduced_decode: bool = recorded(False)
    """Decode large JPEG at 1/2, 1/4 or 1/8 of their size where the crop still has the pixels (simplejpeg or pil)."""
    video_decoder: Literal["pyav", "torchcodec"] = fixed("pyav")
    """Video decoder: other ones choose other frames, so it is fixed in a run and never switched silently."""
    exif: bool = recorded(False)
    """Apply the EXIF orientation (ImageFolder and timm do not)."""
    max_pixels: int = recorded(178_956_970, gt=0)
    """Pictures with more pixels are refused before decoding and count as bad samples."""
    max_bad_fraction: float = free(1e-3, ge=0, le=1)
    """The run stops when more than this share of consumed samples did not decode (checked at log steps, once
    at least 10 are bad)."""
    workers: int = free(4, ge=0)
    """Loader processes per rank; 0 = decode in the training process."""
    prefetch: int = free(2, ge=1)
    """Micro-batches each worker prepares ahead."""
    io_timeout_seconds: float = free(300.0, gt=0)
    """A read that fails is retried with back-off for this long, then the run saves and stops."""
    worker_timeout_seconds: float | None = free(None, gt=0)
    """A loader process that gives nothing for this long is reported with the sample it is at, and the run saves and stops;
    null = 1.6 x `io_timeout_seconds`. Below `timeout_seconds`, or the other ranks give up first."""
    pin_memory: bool = free(True)
    """Copy batches into page-locked memory when training on a GPU."""

    @field_validator("train", "val", mode="before")
    @classmethod
    def _strings_are_sources(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list):
            return [{"name": "main" if len(value) == 1 else f"source{i}", "shards": item} if isinstance(item, str)
                    else item for i, item in enumerate(value)]
        return value

    @property
    def worker_patience(self) -> float:
        """Seconds after which a loader process that gives nothing counts as stalled."""
        return self.worker_timeout_seconds or 1.6 * self.io_timeout_seconds

    @model_validator(mode="after")
    def _workers_outlast_storage(self) -> DataSettings:
        if self.workers and self.worker_patience <= self.io_timeout_seconds:
            raise ValueError(
                f"data.worker_timeout_seconds is {self.worker_patience:g}, data.io_timeout_seconds "
                f"{self.io_timeout_seconds:g}: a loader process that still retries a read would count as stalled; the "
                "former must be larger; data.worker_timeout_seconds=null makes it so")
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> DataSettings:
        for option in ("train", "val"):
            names = [source.name for source in getattr(self, option)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"data.{option} names the source(s) {', '.join(twice)} more than once; "
                                 "each source needs a `name` of its own")
        return self
