"""The Discrete Frame Generation Network: its parts, its sizes, and what it can be asked."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from diffusers.utils import dynamic_modules_utils
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional

from entrecipes import DFGNModel
from entrecipes.models.dfgn import nearest_given
from entrecipes.models.sti import STILayer, TimeConv

TINY = {
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "attention_levels": [False, True],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "text_channels": [12, 6],
    "text_tokens": [3, 2],
    "temporal_in": False,
}
VARIANTS = {
    "as it is": {},
    "patches": {"patch_size": 2},
    "convolutions over time": {"temporal_layer": "conv"},
    "weights from an MLP": {"fusion": "mlp"},
    "frames at full resolution": {"temporal_in": True},
    "frames in order": {"positional": "sinusoidal"},
    "two layers, attention everywhere": {"layers_per_block": 2, "attention_levels": [True, True]},
    "one text as it comes": {"text_channels": None, "text_tokens": None},
    "other channels out": {"in_channels": 4, "out_channels": 8},
}


def tiny(**changes: object) -> DFGNModel:
    """A small model, none of whose parts is at rest."""
    torch.manual_seed(0)
    model = DFGNModel(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("fusion_weights"):
                parameter.copy_(torch.tensor([0.7, 0.9]))
            elif not parameter.any():
                parameter.normal_(std=0.1)
    return model


def asked(model: DFGNModel, count: int = 2, frames: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy clips, timesteps, texts and given first frames."""
    torch.manual_seed(1)
    clips = torch.randn(count, model.config.in_channels, frames, 8, 8)
    condition = torch.zeros_like(clips)
    condition[:, :, :1] = torch.randn_like(clips[:, :, :1])
    return clips, torch.rand(count) * 1000, torch.randn(count, 5, 12), condition


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_predicts_a_clip_and_learns_with_every_part(changes: dict) -> None:
    model = tiny(**changes)
    inputs = asked(model)
    output = model(*inputs).sample
    assert output.shape == (2, model.config.out_channels, 4, 8, 8)
    output.square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    still = [
        name for name, parameter in model.named_parameters() if parameter.grad is not None and not parameter.grad.any()
    ]
    assert not without and not still


@pytest.mark.parametrize("layer", ["sti", "conv"])
def test_any_number_of_frames(layer: str) -> None:
    model = tiny(temporal_layer=layer)
    for frames in range(1, 9):
        with torch.no_grad():
            output = model(*asked(model, 1, frames), return_dict=False)[0]
        assert output.shape == (1, 3, frames, 8, 8) and output.isfinite().all()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_clips_of_a_batch_know_nothing_of_each_other(changes: dict) -> None:
    model = tiny(**changes)
    inputs, order = asked(model, 3), torch.tensor([2, 0, 1])
    with torch.no_grad():
        together, turned = model(*inputs).sample, model(*(part[order] for part in inputs)).sample
        alone = model(*(part[1:2] for part in inputs)).sample
    torch.testing.assert_close(turned, together[order])
    torch.testing.assert_close(alone, together[1:2])


def test_one_timestep_for_all_is_that_for_each() -> None:
    model = tiny(timestep_scale=100.0)
    clips, _, *rest = asked(model)
    with torch.no_grad():
        one, each = model(clips, 0.37, *rest).sample, model(clips, torch.tensor([0.37, 0.37]), *rest).sample
        other = model(clips, 0.38, *rest).sample
    assert torch.equal(one, each) and not torch.allclose(one, other)


@pytest.mark.parametrize("name", ["as it is", "one text as it comes"])
def test_nothing_given_is_zeros_given(name: str) -> None:
    model = tiny(**VARIANTS[name])
    clips, timestep, text, condition = asked(model)
    with torch.no_grad():
        nothing = model(clips, timestep).sample
        zeros = model(clips, timestep, torch.zeros_like(text), torch.zeros_like(clips)).sample
        told, shown = model(clips, timestep, text).sample, model(clips, timestep, condition=condition).sample
    torch.testing.assert_close(nothing, zeros)
    assert not torch.allclose(nothing, told, atol=1e-3) and not torch.allclose(nothing, shown, atol=1e-3)


def test_each_frame_sees_the_others_and_their_order() -> None:
    model = tiny()
    clips, *rest = asked(model)
    changed = clips.clone()
    changed[:, :, 3] += 1
    with torch.no_grad():
        before, after = model(clips, *rest).sample, model(changed, *rest).sample
        mirrored = model(clips.flip(2), *rest[:2], rest[2].flip(2)).sample.flip(2)
    assert all((before - after)[:, :, frame].abs().max() > 1e-3 for frame in range(4))
    assert (before - mirrored).abs().max() > 1e-3


def test_the_text_of_narrow_encoders_is_cut_from_the_widest() -> None:
    model = tiny()
    clips, timestep, text, condition = asked(model)
    padded = text.clone()
    padded[:, 3:, 6:] = 9  # behind what the second encoder gives
    with torch.no_grad():
        assert torch.equal(
            model(clips, timestep, text, condition).sample, model(clips, timestep, padded, condition).sample
        )


@pytest.mark.parametrize("changes", [{}, {"temporal_in": True}, {"temporal_layer": "conv"}], ids=["sti", "in", "conv"])
def test_gradients_are_the_same_with_checkpoints(changes: dict) -> None:
    model = tiny(**changes).train()
    saving = copy.deepcopy(model)
    saving.enable_gradient_checkpointing()
    seen = []
    saving.down_blocks[1].resnets[0].register_forward_pre_hook(lambda *_: seen.append(1))
    for one in (model, saving):
        one(*asked(one)).sample.square().mean().backward()
    assert len(seen) == 2, "the block runs again on the way back"
    for (name, first), second in zip(model.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_saved_and_loaded_it_predicts_the_same_bits(changes: dict, tmp_path) -> None:
    model = tiny(**changes)
    model.save_pretrained(tmp_path)
    loaded = DFGNModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(*asked(model)).sample, model(*asked(model)).sample)
    assert loaded.config.block_out_channels == model.config.block_out_channels


def test_its_source_lies_beside_the_weights(tmp_path, monkeypatch) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "unet")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    copied = get_class_from_dynamic_module(
        tmp_path / "unet", module_file="entrecipes.py", class_name="DFGNModel", trust_remote_code=True
    )
    loaded = copied.from_pretrained(tmp_path / "unet")
    assert loaded.mid_block.temporal_layers[0].forward.__code__.co_filename.startswith(str(tmp_path / "modules"))
    with torch.no_grad():
        assert torch.equal(loaded(*asked(model)).sample, model(*asked(model)).sample)


def test_published_size() -> None:
    with torch.device("meta"):
        model = DFGNModel(text_channels=[1024, 768], text_tokens=[77, 77])

    def millions(*parts: str) -> float:
        named = dict(model.named_parameters())
        return sum(named[name].numel() for name in named if all(part in name for part in parts)) / 1e6

    assert millions() == pytest.approx(960, rel=0.01)
    assert millions(".resnets.") == pytest.approx(467, abs=1)
    assert millions(".attentions.") == pytest.approx(212, abs=1)
    assert millions(".temporal_attentions.") == pytest.approx(208, abs=1)
    assert millions(".temporal_layers.", ".attn.") == pytest.approx(19, abs=1)
    assert millions("text_projection") == pytest.approx((768 * 2048 + 2048 + 2048 * 1024 + 1024) / 1e6)
    assert model.transformer_in.num_attention_heads == model.mid_block.temporal_layers[0].attn.heads == 8


@pytest.mark.parametrize("fusion", ["scalar", "mlp"])
def test_sti_starts_as_its_convolutions(fusion: str) -> None:
    torch.manual_seed(0)
    layer = STILayer(16, 4, 8, fusion)
    frames = torch.randn(6, 16, 5, 4)
    clip = frames.view(2, 3, 16, 5, 4).transpose(1, 2)
    expected = layer.norm(clip + layer.detail(clip)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(layer(frames, 3), expected)


def test_sti_attends_to_pooled_pixels_of_all_frames() -> None:
    torch.manual_seed(0)
    layer = STILayer(16, 4, 8, "scalar")
    with torch.no_grad():
        layer.fusion_weights.copy_(torch.tensor([1.0, 0.0]))
    frames = torch.randn(3, 16, 4, 4, requires_grad=True)
    pooled = frames.view(3, 16, 2, 2, 2, 2).mean((3, 5))  # [F, C, 2, 2]
    seen = layer.attn(pooled.permute(0, 2, 3, 1).reshape(1, 12, 16)).view(3, 2, 2, 16).permute(0, 3, 1, 2)
    semantic = frames + seen.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = layer.norm(semantic[None].transpose(1, 2)).transpose(1, 2)[0]
    output = layer(frames, 3)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("sides", [(1, 1), (1, 4), (3, 5), (5, 4)])
def test_sti_takes_any_sides(sides: tuple[int, int]) -> None:
    layer = STILayer(16, 4, 8, "scalar")
    with torch.no_grad():
        layer.fusion_weights.copy_(torch.tensor([1.0, 1.0]))
        assert layer(torch.randn(4, 16, *sides), 2).shape == (4, 16, *sides)


def test_a_convolution_over_time_is_that_in_three_dimensions() -> None:
    torch.manual_seed(0)
    conv, clip = TimeConv(4, 6), torch.randn(2, 4, 5, 3, 2)
    expected = functional.conv3d(clip, conv.weight, conv.bias, padding=(1, 0, 0))
    torch.testing.assert_close(conv(clip), expected)


def test_adapters_go_on_and_start_as_the_base() -> None:
    model = tiny().requires_grad_(False)
    inputs = asked(model)
    base = model(*inputs).sample
    targets = r".*temporal_attentions.*\.(to_q|to_k|to_v|to_out\.0)"
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    with torch.no_grad():
        assert torch.equal(model(*inputs).sample, base)
    model(*inputs).sample.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("temporal_attentions" in name and "lora" in name for name in trained)
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temporal_layer": "lstm"}, "temporal_layer 'lstm': give sti or conv"),
        ({"fusion": "sum"}, "fusion 'sum'"),
        ({"positional": "rotary"}, "positional 'rotary'"),
        ({"attention_levels": [True]}, "attention_levels"),
        ({"text_tokens": [3]}, "text_tokens"),
    ],
)
def test_wrong_configurations_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DFGNModel(**{**TINY, **changes})


def test_sides_that_cannot_be_halved_are_named() -> None:
    with pytest.raises(ValueError, match="multiples of 4, not 6 x 8"):
        tiny(patch_size=2)(torch.zeros(1, 3, 2, 6, 8), 0.0)


def test_every_frame_sees_the_nearest_given_one_if_asked() -> None:
    frames = torch.randn(2, 3, 5, 4, 4)
    given = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    nearest, flags = nearest_given(frames * given[:, None, :, None, None])
    assert torch.equal(nearest[0], frames[0][:, [1, 1, 1, 4, 4]]) and not nearest[1].any()
    assert torch.equal(flags.bool(), given)
