"""Plans by a language model, run here by transformers or asked at an endpoint that speaks the chat-completions API.

As in GENIUS (arXiv 2304.10970) each round is one conversation made anew: what is remembered from round to round is the
table of plans and losses, not the chat.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from entrecipes.experts.chat import KEY, Endpoint, Local, Message, NoAnswer
from entrecipes.recipe.experts import LanguageModelProposer

if TYPE_CHECKING:
    from entrecipes.experts.proxy_pruning import Task, Trial

logger = logging.getLogger(__name__)

Plan = tuple[float, ...]

PATIENCE = 3
"""Rounds in a row without any answer, after which the model is not asked again."""

SYSTEM = (
    "You are an expert in pruning neural networks. You decide how much of each unit of a diffusion model is kept, so "
    "that at a given budget of FLOPs its loss gets as low as possible. You answer with one JSON object, nothing else."
)


class LanguageModel:
    """Asks a language model for plans, showing it the trials so far; a proposer (see `proxy_pruning.Proposer`).

    An answer that is no plan is sent back with what is wrong, up to `repairs` times; then the valid plans are taken,
    maybe none, and the search fills up. A time-out, a refusal or a broken response never ends a search; after
    `PATIENCE` rounds in a row without any answer the model is not asked again. A model run here is loaded at the first
    question, stays in memory while this object lives, and leaves torch's global random state alone.

    Attributes:
        last_note: What went wrong in the latest round, for the log; empty where nothing did.
        last_exchange: The latest round's conversation, `{"role", "content"}` each, the model's answers included.

    Raises:
        UserError: For a folder that is missing, an endpoint that is no http address; at the first question for a model
            that can't be loaded, or a key that the endpoint refuses.
    """

    name = "llm"

    def __init__(self, section: LanguageModelProposer) -> None:
        self._section = section
        self._backend = Local(section) if section.endpoint is None else Endpoint(section)
        self._silent, self._warned = 0, False
        self.last_note = ""
        self.last_exchange: list[Message] = []

    def propose(
        self, task: Task, round: int, shown: Sequence[Trial], count: int, rng: np.random.Generator
    ) -> list[Plan]:
        """At most `count` plans, one share per unit each, clipped to the range of the levels; `rng` seeds sampling."""
        self.last_exchange = []
        if self._silent >= PATIENCE:
            self.last_note = f"not asked: {PATIENCE} rounds in a row brought no answer"
            return []
        plans, self.last_note = self._converse(task, shown, count, rng)
        if self.last_note and not self._warned:
            self._warned = True
            logger.warning("%s: %s; such cases are only noted in the log from here on", KEY, self.last_note)
        return plans

    def _converse(
        self, task: Task, shown: Sequence[Trial], count: int, rng: np.random.Generator
    ) -> tuple[list[Plan], str]:
        plans: list[Plan] = []
        later: list[Message] = []
        wrong, left_out, asked = "", 0, 0
        try:
            for _ in range(1 + self._section.repairs):
                self.last_exchange, left_out = self._fitted(task, shown, count, later)
                answer, cut_off = self._backend.answer(self.last_exchange, rng)
                asked += 1
                later.append({"role": "assistant", "content": answer})
                self.last_exchange = [*self.last_exchange, later[-1]]
                valid, wrong = parse(answer, count, len(task.units.units), task.levels)
                plans = max(plans, valid, key=len)
                if not wrong:
                    break
                if cut_off:
                    wrong += f" (cut off after max_new_tokens={self._section.max_new_tokens} tokens)"
                demand = "Answer again with the whole JSON object and nothing else."
                later.append({"role": "user", "content": f"That can't be used: {wrong}. {demand}"})
        except NoAnswer as error:
            wrong = f"{wrong}; then {error}" if wrong else str(error)
        self._silent = 0 if asked else self._silent + 1
        notes = []
        if wrong:
            got = f"{len(plans)} of {count} plans" if plans else "no plan"
            notes.append(f"{got} after {asked - 1} repairs: {wrong}" if asked else f"no answer: {wrong}")
        if left_out:
            notes.append(f"{left_out} of {len(shown)} trials left out to fit the model's context")
        return plans, "; ".join(notes)

    def _fitted(
        self, task: Task, shown: Sequence[Trial], count: int, later: list[Message]
    ) -> tuple[list[Message], int]:
        """The conversation, without as many of the oldest trials (the best goes last) as its length asks for."""
        best = min(shown, key=lambda trial: trial.loss, default=None)
        order = sorted(shown, key=lambda trial: (trial is best, trial.round, trial.number))
        for left_out in range(len(order) + 1):
            messages = [*conversation(task, order[left_out:], count), *later]
            if self._backend.fits(messages):
                return messages, left_out
        raise NoAnswer("the question is longer than the model's context, even without trials")


def conversation(task: Task, shown: Sequence[Trial], count: int) -> list[Message]:
    """System message and question for `count` plans."""
    units, (low, high) = task.units, task.group.log_sigma
    snr = [-20 * log_sigma / math.log(10) for log_sigma in (high, low)]  # dB of (a/b)^2 = 1/sigma^2
    lines = [
        "A diffusion model is pruned to a network that serves only noise levels with a signal-to-noise ratio between "
        f"{snr[0]:.1f} dB and {snr[1]:.1f} dB. Its budget is {task.target:.4g} FLOPs per forward pass, "
        f"{task.target / units.base_flops:.1%} of the whole model's {units.base_flops:.4g}. A plan says for each unit "
        "which share of its atoms stays. Only the ratios between a plan's shares matter: they are scaled together "
        "until the network costs its budget. A unit of kind blocks goes where its share is below half of the largest. "
        f"The unpruned model's loss on these noise levels is {task.base_loss:.5g}.",
        "",
        "Units: number, path, kind, atoms, share of the model's FLOPs (without units inside it), importance (the "
        "higher, the more it matters)",
    ]
    for number, (unit, importance) in enumerate(zip(units.units, task.importance, strict=True)):
        inside = "" if unit.parent is None else f", inside unit {unit.parent}"
        share = unit.atoms * unit.flops / units.base_flops
        lines.append(f"{number}: {unit.path}, {unit.kind}, {unit.atoms}, {share:.2%}, {importance:.3g}{inside}")
    lines += ["", f"Allowed shares: {', '.join(map(str, task.levels))}", ""]
    lines.append("Plans measured so far, as fitted to the budget:" if shown else "No plan has been measured so far.")
    best = min((trial.loss for trial in shown), default=math.nan)
    for trial in shown:
        shares = [round(kept / unit.atoms, 3) for kept, unit in zip(trial.kept, units.units, strict=True)]
        ratio, above = trial.flops / task.target, trial.loss - best
        lines.append(f"{shares}: {ratio:.3f} of the budget, loss {trial.loss:.5g}, {above:.3g} above the best")
    lines += [
        "",
        f"Give {count} new plans that you expect to have a lower loss, different from those above and from each other. "
        f'Answer in strict JSON, {{"plans": [[share, ...], ...]}}: exactly {count} lists of exactly '
        f"{len(units.units)} shares each, in the order of the units.",
    ]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n".join(lines)}]


def parse(answer: str, count: int, units: int, levels: Sequence[float]) -> tuple[list[Plan], str]:
    """The valid plans of an answer, and what is wrong with it (empty: nothing).

    Takes the first JSON object that is right, whatever stands around it; else the one with the most valid plans.
    What a model writes before `</think>` is not its answer.
    """
    plans: list[Plan] = []
    wrong = ""
    for value in _objects(answer.rpartition("</think>")[2]):
        if "plans" not in value:
            continue
        valid, problem = _check(value["plans"], count, units, levels)
        if not problem:
            return valid, ""
        if not wrong or len(valid) > len(plans):
            plans, wrong = valid, problem
    return plans, wrong or 'it holds no JSON object with the key "plans"'


def _objects(text: str) -> Iterator[dict[str, Any]]:
    start = text.find("{")
    while start >= 0:
        with suppress(ValueError, RecursionError):
            yield json.JSONDecoder().raw_decode(text, start)[0]
        start = text.find("{", start + 1)


def _check(plans: Any, count: int, units: int, levels: Sequence[float]) -> tuple[list[Plan], str]:
    if not isinstance(plans, list):
        return [], '"plans" is not a list'
    problems = [] if len(plans) == count else [f"{len(plans)} plans in place of {count}"]
    valid = []
    for number, plan in enumerate(plans):
        if not isinstance(plan, list):
            problems.append(f"plan {number} is not a list")
        elif len(plan) != units:
            problems.append(f"plan {number} has {len(plan)} shares in place of {units}")
        elif not all(type(share) in (int, float) and abs(share) < math.inf for share in plan):
            problems.append(f"plan {number} holds something that is no finite number")
        else:
            valid.append(tuple(float(min(max(share, min(levels)), max(levels))) for share in plan))
    return valid[:count], ", ".join(problems[:3])
