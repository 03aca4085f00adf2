"""The weights of a run, whole wherever they lie: measured, saved, restored, or put aside in mid-run.

They may be sharded over processes, or closed blocks held quantised; who asks here need not know.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from entrecipes.training.sharding import load_moments, whole

if TYPE_CHECKING:
    from entrecipes.training.run import Run


@contextlib.contextmanager
def evaluated(run: Run) -> Iterator[nn.Module]:
    """The weights that are evaluated and published, on the device: the averaged ones, or without EMA the trained ones.

    All processes have to ask for them.
    """
    if not run.sharded:
        with run.blocks.whole():
            yield run.ema.model if run.ema else run.model
        return
    model = (run.ema or run.copy).collect()
    yield model.to(run.device)
    model.to("cpu")


def weights(run: Run) -> dict[str, Any]:
    """What training moves: the weights that may be trained, their average and the optimizer's state.

    All processes have to ask for them.
    """
    with run.blocks.whole():
        return {
            "model": run.adapter.state_dict(run.copy.collect() if run.copy else run.model),
            "ema": run.adapter.state_dict(run.ema.collect()) if run.ema else {},
            "optimizer": whole(run.optimizer.optimizer.state_dict()),
        }


def load_weights(run: Run, state: dict[str, Any]) -> None:
    """Restore what [`weights`] gave; the optimizer must be over the same weights as then."""
    with run.blocks.whole(changed=True):
        run.adapter.load_state_dict(run.copy.model if run.copy else run.model, state["model"])
        if run.ema:
            run.adapter.load_state_dict(run.ema.model, state["ema"] or state["model"])
    for follower in filter(None, (run.ema, run.copy)):
        follower.share_out()
    load_moments(run.optimizer.optimizer, state["optimizer"])


def snapshot(run: Run) -> dict[str, Any]:
    """A copy of what training moves, for schedules that try what they may not keep."""
    return copy.deepcopy(weights(run))


def restore(run: Run, state: dict[str, Any]) -> None:
    """Go back to a snapshot, which stays as it is."""
    load_weights(run, copy.deepcopy(state))
