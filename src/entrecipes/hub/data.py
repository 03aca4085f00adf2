"""Prepared data sets on the Hub: parquet files that `datasets.load_dataset` opens by name, and a data card."""

from __future__ import annotations

import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import DatasetCardData

from entrecipes import __version__
from entrecipes.data.prepared import FACTS, facts, prepared_folder, read_prepared
from entrecipes.data.sources import CATALOGUE
from entrecipes.data.sources import source as find_source
from entrecipes.errors import UserError
from entrecipes.hub.commit import Files, Pushed, check_repo_id, commit_files
from entrecipes.hub.refusals import Refused

SHARD_BYTES = 500 * 2**20
LICENSES = {
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
    "CC BY 4.0": "cc-by-4.0",
    "CC0": "cc0-1.0",
    "zlib": "zlib",
    "BSD-3": "bsd-3-clause",
    "GPL-2": "gpl-2.0",
    "Artistic-2.0": "artistic-2.0",
}
"""What licences are called here, and on the Hub; `other` for the rest, whose text the card has."""
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}


def push_data(name: str, repo_id: str, private: bool = False, revision: str | None = None) -> Pushed:
    """Push a prepared data set as a data set repository, in one commit; the same set again makes none.

    Args:
        name: A set that `entrecipes data prepare` has built, or a folder that it or scripts/prepare_stickers.py made.
        repo_id: `owner/name`.
        private: Make a new repository private.
        revision: Branch, made where it is missing; None: main.

    Raises:
        UserError: It is not prepared, damaged, or not to be passed on, or the Hub does not take it; the message names
            the command that tries again.
    """
    check_repo_id(repo_id)
    folder, noted = _prepared(name)
    _check_may_be_passed_on(name, noted)
    dataset = read_prepared(folder).dataset
    options = [*["--private"] * private, *(["--revision", revision] if revision else [])]
    command = shlex.join(["entrecipes", "data", "push", name, "--repo-id", repo_id, *options])
    with tempfile.TemporaryDirectory() as scratch:
        files = _parquet(dataset, Path(scratch)) | {FACTS: folder / FACTS}
        files["README.md"] = data_card(dataset, noted, repo_id, revision).encode()
        message = f"Push {noted['name']} ({noted['images']:,} rows) with entrecipes {__version__}"
        try:
            return commit_files({"data": files}, repo_id, message, kind="dataset", private=private, revision=revision)
        except Refused as refused:
            raise refused.naming(command) from None


def _prepared(name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a prepared set, and what was noted of it. Raises UserError when there is none."""
    folder = Path(name).expanduser()
    if noted := facts(folder):
        return folder, noted
    if folder.is_dir():
        raise UserError(f"{name}: no prepared set (it has no {FACTS}); `entrecipes data ls` lists what can be prepared")
    folder = prepared_folder(find_source(name).name)
    if noted := facts(folder):
        return folder, noted
    raise UserError(f"'{name}' is not prepared on this machine yet: run `entrecipes data prepare {name}`")


def _check_may_be_passed_on(name: str, noted: dict[str, Any]) -> None:
    source = CATALOGUE.get(noted["name"])
    if source is not None and source.kept_private:
        raise UserError(f"'{name}' must not be passed on, so that nothing was sent: {source.kept_private}")
    if noted.get("license") in (None, "", "not stated"):
        raise UserError(
            f"'{name}' says no licence, so that nothing was sent; write who may use it, and how, under `license` in "
            f"its {FACTS}"
        )


def _parquet(dataset: datasets.Dataset, folder: Path) -> Files:
    """The rows as parquet files, images inside; the same rows give the same bytes."""
    count = max(1, -(-dataset.data.nbytes // SHARD_BYTES))
    files = {}
    for number in range(count):
        path = folder / f"train-{number:05d}-of-{count:05d}.parquet"
        dataset.shard(count, number, contiguous=True).to_parquet(path)
        files[f"data/{path.name}"] = path
    return files


def data_card(dataset: datasets.Dataset, noted: dict[str, Any], repo_id: str, revision: str | None = None) -> str:
    """The repository's README: what the set is, from where, under which licence, what the columns hold, how to use it.

    Args:
        dataset: The rows.
        noted: What `prepare` wrote into prepared.json.
        repo_id, revision: Where it goes to.
    """
    kind = _kind(noted)
    licence = _licence(noted["license"])
    about = DatasetCardData(
        license=licence or "other",
        license_name=None if licence else "see-below",
        pretty_name=noted["name"],
        size_categories=[next((size for most, size in SIZES.items() if len(dataset) < most), "n>10M")],
        tags=["entrecipes", kind],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
        dataset_info={"features": dataset.features._to_yaml_list()},
    )
    used = f'load_dataset("{repo_id}", split="train"' + (f', revision="{revision}")' if revision else ")")
    packages = [f"- {one['client']}: `{one['name']}` {one['version']}{_hash(one)}" for one in noted["packages"]]
    options = ", ".join(f"{key} {value}" for key, value in noted["options"].items())
    parts = [
        f"---\n{about.to_yaml()}\n---\n# {noted['name']}",
        noted["source"],
        f"Licence: {noted['license']}",
        "\n".join(["| column | type |", "|---|---|", *_columns(dataset)]),
        _counts(dataset, noted),
        f"## How it was prepared\n\nBy `entrecipes data prepare`{f' with {options}' if options else ''}."
        + (" What it was made from:\n\n" + "\n".join(packages) if packages else ""),
        f"## Use\n\n```python\nfrom datasets import load_dataset\n\nrows = {used}\n```",
        _in_a_recipe(noted, repo_id, revision, used),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _licence(text: str) -> str | None:
    """Its name on the Hub, if it has one."""
    return next((id for name, id in LICENSES.items() if re.match(rf"{re.escape(name)}(?![\w.-])", text)), None)


def _kind(noted: dict[str, Any]) -> str:
    """What a row is."""
    kinds = {"animated": "stickers", "videos": "video frames", "alphabet": "sequences"}
    return next((kind for key, kind in kinds.items() if key in noted), "images")


def _hash(package: dict[str, Any]) -> str:
    return f", sha256 `{package['sha256']}`" if package.get("sha256") else ""


def _columns(dataset: datasets.Dataset) -> list[str]:
    return [f"| `{name}` | {_type(feature)} |" for name, feature in dataset.features.items()]


def _type(feature: Any) -> str:
    if isinstance(feature, datasets.ClassLabel):
        return f"class, {feature.num_classes}: {', '.join(feature.names[:20])}{', ...' * (feature.num_classes > 20)}"
    inner = getattr(feature, "feature", None)
    return f"list of {_type(inner)}" if inner is not None else getattr(feature, "dtype", type(feature).__name__)


def _counts(dataset: datasets.Dataset, noted: dict[str, Any]) -> str:
    lines = [f"{len(dataset):,} rows: {_kind(noted)}."]
    for key, text in (("videos", "{} videos."), ("animated", "{} of them move.")):
        lines += [text.format(f"{noted[key]:,}")] if key in noted else []
    if "alphabet" in noted:
        lines.append(f"Alphabet: `{noted['alphabet']}`.")
    return " ".join(lines)


def _in_a_recipe(noted: dict[str, Any], repo_id: str, revision: str | None, used: str) -> str:
    """How entrecipes trains on it."""
    place = f"{repo_id}@{revision}" if revision else repo_id
    kind = {"images": "hub", "sequences": "hub_sequences"}.get(_kind(noted))
    if kind:
        return f"With entrecipes, in a recipe: `data: {{type: {kind}, id: {place}}}`"
    fetched = [f'"{repo_id}", "{FACTS}", repo_type="dataset"', *([f'revision="{revision}"'] if revision else [])]
    folder, type = repo_id.split("/")[1], {"stickers": "stickers", "video frames": "clips"}[_kind(noted)]
    return (
        f"With entrecipes, in a recipe: `data: {{type: {type}, name: {folder}}}`, after\n\n```python\nimport shutil\n\n"
        "from datasets import load_dataset\nfrom huggingface_hub import hf_hub_download\n\n"
        f'{used}.save_to_disk("{folder}")\nshutil.copy(hf_hub_download({", ".join(fetched)}), "{folder}")\n```'
    )
