"""`entrecipes push`: a finished run to the Hugging Face Hub, in one commit."""

from __future__ import annotations

import argparse

HELP = "push a finished run to the Hugging Face Hub: pipeline, card, recipe, samples, report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("run", help="run folder, such as outputs/digits/demo")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="repository (default: the recipe's hub.repo_id)")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made where it is missing")
    parser.add_argument(
        "--what", default="", metavar="PARTS", help="only these of pipeline,adapter,infonoise,samples,report"
    )
    parser.add_argument("--base", metavar="OWNER/NAME", help="of an adapter trained on a folder: that base on the Hub")
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        default=None,
        help="also every kept checkpoint, each as a pipeline on a branch images-N",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    from entrecipes.training.pushing import push_all

    what = [part.strip() for part in args.what.split(",") if part.strip()]
    for pushed in push_all(args.run, args.repo_id, args.private, args.revision, what, args.checkpoints, args.base):
        print(f"{pushed.url}\n  commit {pushed.commit}{'' if pushed.changed else ': nothing has changed since'}")
    return 0
