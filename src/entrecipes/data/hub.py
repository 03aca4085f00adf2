"""Any image data set of the Hugging Face Hub, or a folder that `datasets` can open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from entrecipes.data.images import Splits
from entrecipes.data.stream import open_stream
from entrecipes.data.tables import Table, open_table, require_columns
from entrecipes.errors import UserError, nearest
from entrecipes.recipe.data import HubData, HubSequenceData
from entrecipes.reference import nearest_id, other_revisions


def load(section: HubData, *, image_size: int, channels: int) -> Splits:
    """Check id, configuration, splits and columns first, then download (or stream).

    Raises:
        UserError: Unknown or gated id, no network, unknown configuration, split or column, bad images.
    """
    place = f"the data set {section.id}"
    saved = Path(section.id).expanduser()
    wanted = {key: getattr(section, key) for key in ("image_column", "label_column", "caption_column")}
    if (saved / "state.json").exists() or (saved / "dataset_dict.json").exists():
        if section.streaming:
            raise UserError(f"data.streaming: {section.id} is on this machine already; leave streaming out.")
        parts = datasets.load_from_disk(str(saved))
        parts = {"train": parts} if isinstance(parts, datasets.Dataset) else parts
        info = next(iter(parts.values())).info
        _check_split(section, list(parts), place, sliced=False)
    else:
        builder = ask(
            section, lambda: datasets.load_dataset_builder(section.id, section.config, revision=section.revision)
        )
        info = builder.info
        if info.splits:
            _check_split(section, list(info.splits), place, sliced=True)
        if info.features:
            require_columns(info.features, wanted, place)
        parts = _Download(section)
    name = section.id.rstrip("/").split("/")[-1] if saved.exists() else section.id
    source = f"Split {section.split} of the data set {name}" + (f" ({section.config})." if section.config else ".")
    table = Table(
        parts[section.split],
        name,
        source,
        info.license or "see the data set's card",
        place,
        image_column=section.image_column,
        held_out=parts[section.held_out_split] if section.held_out_split else None,
    )
    if section.streaming:
        known = (info.splits or {}).get(section.split)
        count = known.num_examples if known else None
        return open_stream(table, section, count=count, image_size=image_size, channels=channels)
    return open_table(table, section, image_size=image_size, channels=channels)


class _Download(dict):
    """Splits by name, each fetched when asked for."""

    def __init__(self, section: HubData) -> None:
        super().__init__()
        self.section = section

    def __missing__(self, split: str) -> Any:
        section = self.section
        return ask(
            section,
            lambda: datasets.load_dataset(
                section.id, section.config, split=split, revision=section.revision, streaming=section.streaming
            ),
        )


def _check_split(section: HubData, splits: list[str], place: str, *, sliced: bool) -> None:
    """Are the splits there? `sliced`: the Hub also takes parts of one, such as `train[:10%]`."""
    for key in ("split", "held_out_split"):
        wanted = getattr(section, key)
        if wanted is not None and (wanted.split("[")[0] if sliced else wanted) not in splits:
            raise UserError(
                f"data.{key}: {place} has no split '{wanted}'{nearest(wanted, splits) or '.'} "
                f"Its splits: {', '.join(splits)}"
            )


def ask(section: HubData | HubSequenceData, call: Any) -> Any:
    """Call `datasets`, and say in one sentence what to do when it can't answer."""
    try:
        return call()
    except DatasetNotFoundError as error:
        if str(error).startswith("Revision"):
            raise UserError(
                f"data.revision: the data set {section.id} has no branch, tag or commit '{section.revision}'"
                + other_revisions(section.id, section.revision, "dataset")
            ) from None
        gated = "gated" in str(error)
        raise UserError(
            f"data.id: '{section.id}' is gated: ask for access on its page, then `hf auth login`."
            if gated
            else f"data.id: '{section.id}' is neither a folder here nor a data set of the Hub that you may see"
            f"{nearest_id(section.id, 'dataset')}. Check the spelling; a private one needs `hf auth login`."
        ) from None
    except (ConnectionError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"data.id: the Hub can't be reached for '{section.id}' ({_first_line(error)}). Use a downloaded folder "
            f"(data.id: PATH), a folder of images (type: folder) or a set that needs no Hub (`entrecipes data ls`)."
        ) from None
    except (ValueError, DatasetsError) as error:
        raise UserError(f"data: '{section.id}' can't be opened: {_first_line(error.__cause__ or error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
