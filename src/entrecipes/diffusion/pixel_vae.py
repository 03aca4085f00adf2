"""A stock `AutoencoderKL` whose weights make it the identity, so that latent pipelines can carry pixel models.

`DiTPipeline` always decodes through a VAE. For a transformer trained on pixels we publish this one: it loads with plain
diffusers, is tiny (2,391 weights for grey images), and returns its input up to 1e-5 of the pixel range.

How an autoencoder with group norms and SiLUs can be the identity: every channel x is carried beside its negative -x.
SiLU then cancels exactly, silu(z) - silu(-z) = z. One more pair, the constants +K and -K with K far above any pixel,
makes the group norm's mean zero and its variance the constant K^2 / pairs, up to a relative (x / K)^2. Residual
branches are zero.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

ANCHOR = 512.0


@torch.no_grad()
def build_pixel_vae(channels: int, sample_size: int) -> AutoencoderKL:
    """The identity as an `AutoencoderKL`: `channels` in, as many latents out, no down-sampling, scaling factor 1.

    Args:
        channels: Image (and latent) channels.
        sample_size: Side of the image in pixels, for the config only; any size passes.
    """
    pairs = channels + 1
    width = 2 * pairs
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(width,),
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=sample_size,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    for parameter in vae.parameters():
        parameter.zero_()
    for coder in (vae.encoder, vae.decoder):
        for channel in range(channels):
            coder.conv_in.weight[2 * channel, channel, 1, 1] = 1.0
            coder.conv_in.weight[2 * channel + 1, channel, 1, 1] = -1.0
        coder.conv_in.bias[-2:] = torch.tensor([ANCHOR, -ANCHOR])
        coder.conv_norm_out.weight.fill_(ANCHOR / pairs**0.5)  # undoes the division by the norm's standard deviation
        for channel in range(channels):
            coder.conv_out.weight[channel, 2 * channel, 1, 1] = 1.0
            coder.conv_out.weight[channel, 2 * channel + 1, 1, 1] = -1.0
    vae.encoder.conv_out.bias[channels:] = -30.0  # log variance: the posterior is a point
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def is_pixel_vae(vae: AutoencoderKL) -> bool:
    """Whether a VAE is the identity, asked by passing an image through it."""
    if vae.config.latent_channels != vae.config.in_channels or len(vae.config.block_out_channels) > 1:
        return False
    image = torch.linspace(-1, 1, vae.config.in_channels * 64).reshape(1, vae.config.in_channels, 8, 8)
    image = image.to(vae.device, vae.dtype)
    return bool(torch.allclose(vae.encode(image).latent_dist.mode(), image, atol=1e-3))
