"""Build a set of animated stickers for `data: {type: stickers, name: FOLDER}`.

    python scripts/prepare_stickers.py -o stickers                     # 477 moving emoji and stills, 165 MB through npm
    python scripts/prepare_stickers.py --packs 1,2,3,4 --size 64 -o stickers64                            # all, 0.7 GB
    python scripts/prepare_stickers.py --archive lobehub-fluent-emoji-anim-1-1.0.0.tgz -o stickers    # got elsewhere
    python scripts/prepare_stickers.py --folder my_gifs --size 64 -o mine                              # your own files

`--folder` takes GIF, APNG, WebP, still pictures, videos and Lottie (.json, .tgs; `pip install rlottie-python`),
described by a metadata.jsonl in it: one {"file_name": ..., "caption": ...} a line, and, where known, "group" (a
category) and "base" (what variants of one drawing share: they stay on one side of the split).

A call that is cut off goes on where it stopped when it is repeated. Files that can't be read are named and left out. To
look at the result: `entrecipes data inspect FOLDER`. Exit code: 0, or 2 when something is missing or wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import datasets

from entrecipes.data.sticker_preparation import StickerOptions, from_folder, from_packs, prepare_stickers
from entrecipes.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--packs", help="which of the four packs of animated emoji, such as 1,2,3,4 (1)")
    source.add_argument("--folder", type=Path, metavar="DIR", help="your own files with a metadata.jsonl")
    parser.add_argument(
        "--archive",
        type=Path,
        action="append",
        default=[],
        metavar="TGZ",
        help="a pack, or one of the packages of names, that is here already; may be given several times",
    )
    parser.add_argument("--flags", action="store_true", help="also the still flags, a third of the first pack")
    parser.add_argument("--size", type=int, default=32, help="side in pixels (%(default)s)")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip (%(default)s)")
    parser.add_argument(
        "--key-frames",
        choices=("cluster", "even"),
        default="cluster",
        help="the first of each cluster of looks, or equally far apart (%(default)s)",
    )
    parser.add_argument("--license", default="not stated", help="of the files in --folder (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    datasets.disable_progress_bars()
    try:
        options = StickerOptions(args.size, args.frames, args.key_frames)
        if args.folder:
            if args.archive or args.flags:
                raise UserError("--folder: --archive and --flags are for packs; leave them out")
            found = from_folder(args.folder, args.license)
        else:
            found = from_packs(args.packs, args.archive, flags=args.flags)
        noted, bad = prepare_stickers(found, args.output, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{noted['animated']:,} moving and {noted['images'] - noted['animated']:,} still stickers in {args.output}")
    if bad:
        print(f"{len(bad)} files are left out:", *bad, sep="\n  ")
    print(f"licence: {noted['license']}\nin a recipe: data: {{type: stickers, name: {args.output}}}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
