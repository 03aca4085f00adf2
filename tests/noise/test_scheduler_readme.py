"""The loop and the sampling of docs/noise.md, as they stand there with smaller numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from doc_blocks import smaller
from scheduler_case import ours

from entrecipes import InfoNoiseScheduler

PAGE = (Path(__file__).parents[2] / "docs/noise.md").read_text()
LOOP, SAMPLING = (part.split("```")[0] for part in PAGE.split("```python\n")[1:])


def test_five_lines_are_marked() -> None:
    assert sorted(line[-1] for line in LOOP.splitlines() if line[-3:-1] == "# ") == ["1", "2", "3", "4", "5"]


@pytest.mark.filterwarnings("ignore")
def test_the_loop_learns_resumes_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    record, calls = InfoNoiseScheduler.record, []

    def killed(*arguments: object) -> object:
        calls.append(None)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return record(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(InfoNoiseScheduler, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            exec(smaller(LOOP), {})
    assert torch.load("checkpoint.pt")["step"] == 20

    names: dict[str, object] = {}
    exec(smaller(LOOP), names)
    scheduler = names["scheduler"]
    assert names["first"] == 20 and scheduler._learner.images == 160 and scheduler._learner.ramped == 1

    exec(SAMPLING, names)
    assert names["images"][0].size == (8, 8) and names["grid"].settings["profile"] == scheduler.settings["profile"]
    names["grid"].set_timesteps(10)
    torch.testing.assert_close(names["stock"].sigmas, names["grid"].sigmas, rtol=1e-3, atol=1e-5)


def test_accelerate_checkpoints_it(tmp_path: Path) -> None:
    """`register_for_checkpointing` takes what has a state."""
    scheduler, again = (ours("edm", train_images=100) for _ in range(2))
    x = torch.randn(8, 3, 4, 4)
    scheduler.record(x, x, x, scheduler.sample_timesteps(8))
    for part, method in ((scheduler, "save_state"), (again, "load_state")):
        accelerator = Accelerator(cpu=True)
        accelerator.register_for_checkpointing(part)
        getattr(accelerator, method)(str(tmp_path / "state"))
    assert again.settings == scheduler.settings and again._learner.images == 8
