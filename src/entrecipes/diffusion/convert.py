"""Original DiT and SiT checkpoints as ordinary `DiTPipeline`s.

DiT is Peebles & Xie 2023 (github.com/facebookresearch/DiT), SiT is Ma et al. 2024 (github.com/willisma/SiT). Both save
the same tensors under the same names, so that the user says which it is. What differs in `DiTTransformer2DModel`:

- queries, keys and values are three layers, not one; every block has a time and class embedder, not all share one;
- the sinusoids of the time embedding are others (see `time_embedding`);
- SiT's time runs from noise at 0 to data at 1, and it predicts data - noise: the time is turned within the time
  embedding's weights and the velocity's sign within the last layer's, so that diffusers' flow schedulers fit;
- SiT has output channels for a variance that nothing reads: they are left out.

The original samplers guide only three of the four latent channels (DiT's by default); `DiTPipeline` guides all.
"""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
)
from diffusers.models.embeddings import TimestepEmbedding
from safetensors.torch import load_file
from torch import Tensor

from entrecipes.diffusion.pixel_vae import build_pixel_vae
from entrecipes.diffusion.time_embedding import SINUSOIDS, fit_time_embedding
from entrecipes.errors import UserError

logger = logging.getLogger(__name__)

POOR_FIT = 1e-2
"""Relative error of the time embedding that is warned of: outputs differ visibly from the original's then."""

KINDS = {"dit": "DiT", "sit": "SiT"}
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads by width, for the published sizes S, B, L and XL; a file does not tell them."""

NULL_LABEL = 1000
"""What DiTPipeline passes for "no class", whatever the number of classes."""

IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}


def read_checkpoint(path: str | Path, ema: bool = True) -> dict[str, Tensor]:
    """The weights in a file of DiT or SiT: released weights, or what their `train.py` saves; `.pt` or `.safetensors`.

    Args:
        path: The file. It is read without running any code that it may hold.
        ema: Of a training checkpoint, take the averaged weights (as the original samplers do), not the raw.

    Raises:
        UserError: For a file that can't be read or holds no such weights, or a SiT trained on another path or target.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # train.py saves its arguments too
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a checkpoint of DiT or SiT") from error
    except Exception as error:  # given a file of another kind, the readers raise anything
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: no PyTorch or safetensors file of weights alone ({first_line}); give a checkpoint of DiT or SiT"
        ) from error
    arguments = found.get("args") if isinstance(found, dict) else None
    for name, wanted in {"path_type": "Linear", "prediction": "velocity"}.items():
        if (value := getattr(arguments, name, wanted)) != wanted:
            raise UserError(f"{path}: trained with {name} {value}; only {wanted} fits diffusers' flow schedulers")
    key = "ema" if ema else "model"
    state = found.get(key, found) if isinstance(found, dict) else found
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{path}: no weights of a DiT or SiT in it, nor under its key '{key}'; give another file")
    return state


@torch.no_grad()
def convert_transformer(
    state: dict[str, Tensor], kind: str, num_attention_heads: int | None = None
) -> DiTTransformer2DModel:
    """The network, in float32 and eval mode; its size is told from the shapes.

    A DiT becomes a model of the noise (and of the variance, if it was trained so) at timesteps 0 to 999, a SiT one of
    noise - data at timesteps 1000 sigma. Fewer than 1000 classes are filled up with "no class", so that guidance in
    `DiTPipeline` finds it under its label 1000. The error of the time embedding is logged.

    Args:
        state: The original's state dict.
        kind: `dit` or `sit`.
        num_attention_heads: None: the published sizes' (widths 384, 768, 1024, 1152).

    Raises:
        UserError: When the weights are another model's, naming the tensors at fault.
    """
    if kind not in KINDS:
        raise UserError(f"type '{kind}' is not supported; take one of {', '.join(KINDS)}")
    config = _config(state, kind, num_attention_heads)
    with init_empty_weights():  # no random weights, which take longer than the conversion
        model = DiTTransformer2DModel(**config)
    if not torch.allclose(state["pos_embed"].float(), model.pos_embed.pos_embed, atol=1e-2):
        raise UserError(
            f"pos_embed: not the fixed sine-cosine positions of {KINDS[kind]}, which diffusers computes for itself; "
            "such a model can't be converted"
        )
    converted = _rename({name: value.to(torch.float32, copy=True) for name, value in state.items()}, kind, config)
    model.load_state_dict(converted, assign=True)
    return model.eval()


def convert_dit(
    state: dict[str, Tensor],
    kind: str,
    scheduler: SchedulerMixin | None = None,
    vae: AutoencoderKL | None = None,
    num_attention_heads: int | None = None,
) -> DiTPipeline:
    """The pipeline; saved, it loads with plain diffusers.

    Args:
        state: The original's state dict.
        kind: `dit` or `sit`.
        scheduler: None: DDIM with the linear betas of DiT, or DPM-Solver++ along the straight path of SiT. The latter
            rounds timesteps down, as all stock schedulers of this kind but `FlowMapEulerDiscreteScheduler` do.
        vae: What the model's latents belong to; None for a model of pixels.
        num_attention_heads: None: the published sizes'.

    Raises:
        UserError: When the weights are another model's, or the VAE does not fit them.
    """
    model = convert_transformer(state, kind, num_attention_heads)
    channels = model.config.in_channels
    if vae is None and channels not in (1, 3):
        raise UserError(
            f"the model denoises latents of {channels} channels, but there is no VAE; give the one that it was trained "
            "with (the published models: stabilityai/sd-vae-ft-ema)"
        )
    if vae is not None and vae.config.latent_channels != channels:
        raise UserError(
            f"the model denoises {channels} channels, but the VAE's latents have {vae.config.latent_channels}; give "
            "the VAE that the model was trained with"
        )
    if scheduler is None and kind == "sit":
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    elif scheduler is None:
        scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    vae = vae or build_pixel_vae(channels, model.config.sample_size)
    return DiTPipeline(transformer=model, vae=vae, scheduler=scheduler)


def _config(state: dict[str, Tensor], kind: str, heads: int | None) -> dict[str, Any]:
    """The diffusers config that the shapes tell, once every tensor is there and has the shape that it must have."""
    patches, positions = (state.get(name, torch.empty(0)).shape for name in ("x_embedder.proj.weight", "pos_embed"))
    if len(patches) != 4 or len(positions) != 3 or "y_embedder.embedding_table.weight" not in state:
        raise UserError(
            f"no weights of a {KINDS[kind]}: x_embedder.proj.weight, pos_embed or y_embedder.embedding_table.weight is "
            "missing or of another shape; give a checkpoint of the original code, unchanged"
        )
    (width, channels, patch, _), tokens = patches, positions[1]
    out = len(state.get("final_layer.linear.bias", ())) // patch**2
    labels = len(state["y_embedder.embedding_table.weight"])
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    _check_tensors(state, kind, _shapes(width, max(depth, 1), channels, patch, out, tokens, labels))

    side = math.isqrt(tokens)
    if side**2 != tokens or out not in (channels, 2 * channels) or labels > NULL_LABEL + 1:
        raise UserError(
            f"{tokens} positions, {channels} channels in, {out} out and {labels} labels don't fit DiTPipeline, which "
            f"has square images, as many channels out as in or twice as many, and at most {NULL_LABEL} classes"
        )
    heads = heads or HEADS.get(width)
    if heads is None or width % heads:
        raise UserError(
            f"num_attention_heads: {heads or 'unknown'} for the width {width}; give the number that the model was "
            f"trained with, a divisor of {width}"
        )
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": channels if kind == "sit" else out,
        "num_layers": depth,
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": NULL_LABEL,
        "norm_eps": 1e-6,
    }


def _check_tensors(state: dict[str, Tensor], kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a state dict that lacks a tensor, has one more, or one of another shape."""
    faults = {
        "missing": [name for name in shapes if name not in state],
        "unknown": [name for name in state if name not in shapes],
        "of another shape": [name for name in shapes if name in state and tuple(state[name].shape) != shapes[name]],
    }
    for fault, names in faults.items():
        if names:
            raise UserError(
                f"no weights of a {KINDS[kind]}: {fault}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}; "
                "give a checkpoint of the original code, unchanged"
            )


def _shapes(
    width: int, depth: int, channels: int, patch: int, out: int, tokens: int, labels: int
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the original and its shape."""
    layers = {
        "t_embedder.mlp.0": (width, SINUSOIDS),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch * patch * out, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "x_embedder.proj": (width, channels, patch, patch),
    }
    for index in range(depth):
        layers[f"blocks.{index}.attn.qkv"] = (3 * width, width)
        layers[f"blocks.{index}.attn.proj"] = (width, width)
        layers[f"blocks.{index}.mlp.fc1"] = (4 * width, width)
        layers[f"blocks.{index}.mlp.fc2"] = (width, 4 * width)
        layers[f"blocks.{index}.adaLN_modulation.1"] = (6 * width, width)
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return shapes | {"pos_embed": (1, tokens, width), "y_embedder.embedding_table.weight": (labels, width)}


def _rename(state: dict[str, Tensor], kind: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of `DiTTransformer2DModel`."""
    converted = {}
    for part in ("weight", "bias"):
        converted[f"pos_embed.proj.{part}"] = state[f"x_embedder.proj.{part}"]
        converted[f"proj_out_1.{part}"] = state[f"final_layer.adaLN_modulation.1.{part}"]
        converted[f"proj_out_2.{part}"] = _last_layer(state[f"final_layer.linear.{part}"], kind, config)
        for index in range(config["num_layers"]):
            for theirs, ours in IN_BLOCK.items():
                converted[f"transformer_blocks.{index}.{ours}.{part}"] = state[f"blocks.{index}.{theirs}.{part}"]
            three = state[f"blocks.{index}.attn.qkv.{part}"].chunk(3)
            for name, value in zip(("to_q", "to_k", "to_v"), three, strict=True):
                converted[f"transformer_blocks.{index}.attn1.{name}.{part}"] = value.clone()
    embedder = _embedder(state, kind)
    for index in range(config["num_layers"]):
        for name, value in embedder.items():  # each block owns its copy
            converted[f"transformer_blocks.{index}.norm1.emb.{name}"] = value.clone()
    return converted


def _embedder(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The time and class embedder, which the original has once."""
    original = TimestepEmbedding(SINUSOIDS, state["t_embedder.mlp.2.bias"].shape[0])
    for layer, index in ((original.linear_1, 0), (original.linear_2, 2)):
        layer.load_state_dict({part: state[f"t_embedder.mlp.{index}.{part}"] for part in ("weight", "bias")})
    fitted, error = fit_time_embedding(original, kind)
    level = logging.WARNING if error > POOR_FIT else logging.INFO
    logger.log(level, "time embedding converted with a relative error of %.1e", error)
    table = state["y_embedder.embedding_table.weight"]
    null = table[-1:].expand(NULL_LABEL + 1 - len(table), -1)
    embedder = {f"timestep_embedder.{name}": value for name, value in fitted.state_dict().items()}
    return embedder | {"class_embedder.embedding_table.weight": torch.cat([table, null])}


def _last_layer(value: Tensor, kind: str, config: dict[str, Any]) -> Tensor:
    """The last layer's weight or bias; SiT's without its variance, and with the sign turned."""
    if kind == "dit":
        return value
    patches = value.unflatten(0, (config["patch_size"] ** 2, -1))
    return -patches[:, : config["in_channels"]].flatten(0, 1)
