"""The loop of docs/experts.md, as it stands there with a shorter run, and the page of TDC's recipes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from doc_blocks import smaller
from doc_folder import SMALL_UNET

from entrecipes import ExpertsPipeline, SlimUNet2DModel, TimestepExperts
from entrecipes.information.proxies import flops
from entrecipes.recipe.load import load

ROOT = Path(__file__).parents[2]
LOOP, LOADING = (part.split("```")[0] for part in (ROOT / "docs/experts.md").read_text().split("```python\n")[1:])
PAGE = (ROOT / "recipes/tdc/README.md").read_text()
SAMPLING = PAGE.split("## The pipeline\n\n```python\n")[1].split("```")[0]


@pytest.mark.filterwarnings("ignore")
def test_the_loop_trains_two_experts_that_serve_their_timesteps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    unet = UNet2DModel(**SMALL_UNET)
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained("my-pipeline")
    torch.save(2 * torch.rand(64, 1, 8, 8) - 1, "my-data.pt")
    names: dict[str, object] = {}
    exec(smaller(LOOP), names)

    units, (small, large) = names["units"], names["experts"]
    assert (type(small), type(large)) == (SlimUNet2DModel, UNet2DModel)
    x = torch.randn(2, 1, 8, 8)
    assert flops(lambda: small(x[:1], 0)) == pytest.approx(0.6 * units.base_flops, rel=0.02)
    assert not torch.equal(large.conv_in.weight, names["base"].conv_in.weight)  # trained, not the base itself
    assert torch.equal(names["base"].conv_in.weight, unet.conv_in.weight)

    del names["pipeline"]
    exec(LOADING, names)
    routed = names["pipeline"].unet
    with torch.no_grad():
        for time, expert in ((999, small), (600, small), (599, large), (0, large)):
            assert torch.equal(routed(x, time).sample, expert(x, time).sample)
    assert names["pipeline"](num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.filterwarnings("ignore")
def test_the_page_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    networks = [UNet2DModel(**SMALL_UNET, num_class_embeds=10) for _ in range(5)]
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    routed = TimestepExperts(networks, [800, 600, 400, 200])
    ExpertsPipeline(routed, scheduler).save_pretrained("outputs/tdc/digits_unet/pipeline")
    names: dict[str, object] = {}
    exec(SAMPLING, names)
    assert len(names["images"]) == 10 and names["images"][0].size == (8, 8)


def test_the_commands_of_the_page_load() -> None:
    rows = re.findall(r"^\|[^|]+\| `([^|`]*=[^|`]*)` \|$", PAGE, re.MULTILINE)
    assert len(rows) == 22
    for changes in rows:
        load("tdc/digits_unet", shlex.split(changes))
    lines = [line for line in PAGE.splitlines() if line.startswith("entrecipes run tdc/")]
    assert lines
    for _, _, recipe, *changes in (shlex.split(line, comments=True) for line in lines):
        load(recipe, [change for change in changes if change != "--dry-run"])
