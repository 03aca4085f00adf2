"""SimDA and I2V-Adapter as modules: nothing at first, what they compute, on and off, saved and loaded."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from diffusers import AutoModel, UNet3DConditionModel
from diffusers.utils import dynamic_modules_utils
from tiny_dfgn import FRAMES, clips, output, shake, tiny_dfgn
from torch import nn
from torch.nn import functional

import entrecipes
from entrecipes import I2VAdapter, SimDA
from entrecipes.diffusion.adapter_folder import Base
from entrecipes.diffusion.side import save_side_adapter
from entrecipes.models.simda import Bottleneck, Shift, TemporalBottleneck

MAKERS = {
    "simda": SimDA.of,
    "i2v": I2VAdapter.of,
    "i2v, up": lambda model: I2VAdapter.of(model, blocks="up"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_nothing_at_first_something_later_and_leaves_no_trace(name):
    model, inputs = tiny_dfgn(), clips(1, 2)
    base, keys = output(model, inputs), model.state_dict().keys()
    adapter = MAKERS[name](model).attach(model)
    assert torch.equal(output(model, inputs), base)
    shake(adapter)
    adapted = output(model, inputs)
    assert not torch.equal(adapted[0], base[0])

    twin = copy.deepcopy(model)
    shake(adapter, seed=2)
    assert torch.equal(output(twin, inputs), adapted), "a copy has an adapter of its own"
    assert not torch.equal(output(model, inputs), adapted)
    twin.side_adapter.detach()
    assert torch.equal(output(twin, inputs), base)
    adapter.detach()
    assert torch.equal(output(model, inputs), base) and model.state_dict().keys() == keys
    adapter.attach(model)
    assert not torch.equal(output(model, inputs), base)


def test_other_video_models_take_simda():
    model = UNet3DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    inputs = {key: value for key, value in clips().items() if key != "condition"}
    inputs |= {"timestep": 10, "sample": torch.randn(2, 4, 3, 8, 8)}
    base = output(model, inputs)
    adapter = SimDA.of(model).attach(model)
    assert torch.equal(output(model, inputs), base)
    shake(adapter)
    assert not torch.equal(output(model, inputs), base)
    adapter.detach()
    with pytest.raises(ValueError, match="takes no `condition`"):
        I2VAdapter.of(model).attach(model)


def test_the_layers_of_simda():
    layer, beside = nn.Linear(8, 8), Bottleneck(8, 0.25)
    shake(beside)
    behind, tokens = copy.deepcopy(beside), torch.randn(2, 3, 8)
    assert beside.down.out_features == 2
    plain = layer(tokens)
    handle = layer.register_forward_hook(beside.beside)
    torch.testing.assert_close(layer(tokens), plain + beside(tokens))
    handle.remove()
    layer.register_forward_hook(behind.behind)
    torch.testing.assert_close(layer(tokens), plain + behind(plain))

    adapter = TemporalBottleneck(6, 0.5)
    shake(adapter)
    adapter.frames = 4
    hidden = torch.randn(8, 6, 2, 3)
    clip = hidden.unflatten(0, (2, 4)).transpose(1, 2)
    down, mix, up = (layer.weight for layer in (adapter.down, adapter.mix, adapter.up))
    inner = functional.conv3d(clip, down[:, :, None], adapter.down.bias)
    inner = functional.conv3d(inner, mix.unsqueeze(-1), adapter.mix.bias, padding=(1, 0, 0), groups=3)
    wanted = functional.conv3d(inner, up[:, :, None], adapter.up.bias)
    torch.testing.assert_close(adapter(hidden), wanted.transpose(1, 2).flatten(0, 1))
    torch.testing.assert_close(adapter.behind(layer, (), hidden), hidden + adapter(hidden))


def test_shifted_tokens_by_hand():
    shift = Shift(2)
    shift.frames = 3
    shift.measure(nn.Identity(), (torch.empty(6, 1, 2, 5),))
    tokens = torch.arange(6.0).repeat_interleave(10).view(6, 10, 1)  # each says which frame of which clip it is of
    back = [0, 1, 2, 0, 0] + [1, 2, 0, 1, 1]  # counted 0, 1, 2, 3, 0 and 4, 5, 6, 7, 4 over squares of 4 x 4
    wanted = torch.tensor([[3 * clip + (frame - b) % 3 for b in back] for clip in range(2) for frame in range(3)])
    assert torch.equal(shift(tokens).squeeze(2), wanted.float())


def test_latent_shift_changes_the_base_at_once_and_only_with_several_frames():
    model, inputs, still = tiny_dfgn(), clips(), clips(frames=1)
    base, base_of_still = output(model, inputs), output(model, still)
    adapter = SimDA.of(model, shift=2).attach(model)
    assert not torch.equal(output(model, inputs), base)
    torch.testing.assert_close(output(model, still), base_of_still)
    adapter.detach()
    assert torch.equal(output(model, inputs), base)


@pytest.mark.parametrize("given", [(0,), (1, 2), (3,)])
def test_the_branch_attends_to_the_first_given_frame_by_itself(given):
    """Checked on one attention, against what the base computes of that frame."""
    model, inputs = tiny_dfgn(), clips(*given)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    attention, seen = model.get_submodule(path), []
    attention.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    frame = inputs["condition"][:, :, given[0] : given[0] + 1]
    output(model, inputs | {"sample": frame, "condition": frame})
    (alone, _) = seen.pop()

    adapter = I2VAdapter.of(model).attach(model)
    branch = adapter.branches["mid_block-attentions-0-transformer_blocks-0"]
    assert torch.equal(branch.to_q.weight, attention.to_q.weight)
    shake(branch)
    attention.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    output(model, inputs)
    hidden, before = seen[-2]  # the hook above stands before the branch, the other one behind it
    _, behind = seen[-1]

    def heads(tokens):
        return tokens.unflatten(-1, (attention.heads, -1)).transpose(-3, -2)

    for row in range(2 * FRAMES):
        if row >= FRAMES:
            assert torch.equal(behind[row], before[row]), "nothing is given in the second clip"
            continue
        q, k, v = heads(branch.to_q(hidden[row])), heads(attention.to_k(alone[0])), heads(attention.to_v(alone[0]))
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        added = branch.to_out((weights @ v).transpose(-3, -2).flatten(-2))
        torch.testing.assert_close(behind[row], before[row] + added)


def test_clips_without_a_given_frame_are_left_to_the_base():
    model, inputs, none = tiny_dfgn(), clips(2), clips()
    base, base_of_none = output(model, inputs), output(model, none)
    shake(I2VAdapter.of(model).attach(model))
    adapted = output(model, inputs)
    assert torch.equal(adapted[1], base[1]) and not torch.equal(adapted[0], base[0])
    assert torch.equal(output(model, none), base_of_none)
    assert torch.equal(output(model, none | {"condition": None}), base_of_none)


@pytest.mark.parametrize("name", ["simda", "i2v"])
def test_gradient_checkpointing_and_positional_inputs_change_nothing(name):
    gradients = []
    for checkpointed in (False, True):
        model, inputs = tiny_dfgn().requires_grad_(False), clips(1)
        torch.manual_seed(0)
        adapter = MAKERS[name](model).attach(model)
        shake(adapter)
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.train()
        result = model(*inputs.values(), return_dict=False)[0]
        assert torch.equal(result, model(**inputs).sample)
        result = model(**inputs).sample
        result.square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert {key for key, value in gradients[0].items() if value is not None} == {
        key for key in gradients[0] if key.startswith("side_adapter.")
    }
    for key, value in gradients[0].items():
        if value is not None:
            assert value.any(), key
            torch.testing.assert_close(gradients[1][key], value)


@pytest.mark.parametrize("name", ["simda", "i2v"])
def test_saved_alone_it_loads_on_a_fresh_base(name, tmp_path):
    model, inputs = tiny_dfgn(), clips(1)
    adapter = MAKERS[name](model).attach(model)
    shake(adapter)
    wanted = output(model, inputs)
    adapter.save_pretrained(tmp_path)
    size = sum(p.nbytes for p in adapter.parameters())
    assert size <= (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size < size + 12_000
    fresh = tiny_dfgn()
    getattr(entrecipes, type(adapter).__name__).from_pretrained(tmp_path).attach(fresh)
    assert torch.equal(output(fresh, inputs), wanted)


def test_it_brings_its_source_along(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    model, inputs = tiny_dfgn(), clips(1)
    shake(I2VAdapter.of(model).attach(model))
    save_side_adapter(model.side_adapter, tmp_path / "adapter", Base("owner/base", None, False, "-"))
    assert not any("entrecipes" in path.read_text() for path in (tmp_path / "adapter").glob("*.py"))
    adapter = AutoModel.from_pretrained(str(tmp_path / "adapter"), trust_remote_code=True)
    assert "not expected" not in caplog.text
    assert type(adapter).__module__.startswith("diffusers_modules.")
    fresh = tiny_dfgn()
    adapter.attach(fresh)
    assert torch.equal(output(fresh, inputs), output(model, inputs))


def test_what_does_not_fit_is_refused():
    model = tiny_dfgn()
    adapter = SimDA.of(model).attach(model)
    for other in (adapter, I2VAdapter.of(model)):
        with pytest.raises(ValueError, match="detach first"):
            other.attach(model)
    adapter.detach()
    wide = tiny_dfgn(block_out_channels=(8, 32))
    for one in (adapter, I2VAdapter.of(model)):
        with pytest.raises(ValueError, match=r"made for another base: .* 16 here|made for another base: .*'width': 16"):
            one.attach(wide)
    with pytest.raises(ValueError, match="no spatial transformer blocks"):
        SimDA.of(nn.Linear(2, 2))
