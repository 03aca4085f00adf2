from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from sklearn.datasets import load_digits

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_digits.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unet(**keys):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    return UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, **blocks, **keys)


def save_unet(folder):
    torch.manual_seed(0)
    ConsistencyModelPipeline(unet(num_class_embeds=10), DDIMScheduler()).save_pretrained(folder)


def save_dit(folder):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=4, norm_num_groups=1, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(1, 1, block_out_channels=(4,), norm_num_groups=1, latent_channels=1, sample_size=8)
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)


@pytest.mark.parametrize("save", [save_unet, save_dit])
def test_an_untrained_pipeline_is_found_out(script, save, tmp_path, capsys):
    save(tmp_path / "pipeline")
    command = [str(tmp_path / "pipeline"), "--samples", "40", "--steps", "2", "--guidance-scale", "2"]
    assert script.main([*command, "--json", str(tmp_path / "found.json")]) == 1
    assert "FAILED" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["agreement"] == pytest.approx(np.mean(found["agreement_per_class"])) and found["agreement"] < 0.5
    assert found["classifier_accuracy_on_real"] > 0.98
    assert script.main([*command, "--at-least", "0", "--batch-size", "7", "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == found


@pytest.mark.parametrize("size", [8, 16])
def test_real_digits_agree_with_their_class(script, size):
    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images / 16 * 255) / 255).float()[:, None].expand(-1, 3, -1, -1)
    classifier, _ = script.train_classifier()
    larger = torch.nn.functional.interpolate(images, size=(size, size))
    assert (classifier.predict(script.to_digits(larger)) == digits.target).mean() > 0.98


def test_what_can_not_be_checked_exits_with_2(script, tmp_path, capsys):
    DDPMPipeline(unet(), DDIMScheduler()).save_pretrained(tmp_path)
    assert script.main([str(tmp_path)]) == 2
    assert "takes no class labels" in capsys.readouterr().err
    for wrong in ([str(tmp_path / "nowhere")], [str(tmp_path), "--samples", "5"]):
        with pytest.raises(SystemExit) as stop:
            script.main(wrong)
        assert stop.value.code == 2


def test_it_runs_where_entrecipes_can_not_be_imported(tmp_path):
    save_unet(tmp_path)
    code = (
        "import sys, runpy; sys.modules['entrecipes'] = None; "
        f"sys.argv = ['check_digits', {str(tmp_path)!r}, '--samples', '10', '--steps', '1', '--at-least', '0']; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "class asked and seen agree" in ran.stdout
