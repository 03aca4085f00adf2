"""What `scripts/benchmark_experts.py` measured, as a page of Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from entrecipes.evaluation.result import Metric
from entrecipes.report.comparison.arms import Spread
from entrecipes.report.comparison.tables import Table, difference_text, spread_text
from entrecipes.report.facts import flops, number, origins, reduced

Run = Mapping[str, Any]
Arms = Mapping[str, Mapping[int, Run]]
"""Runs by seed, by arm; the first arm is what the others are held against."""
Values = Mapping[str, Callable[[Run], float | None]]
"""What to read from a run, by column."""


def markdown(found: Mapping[str, Any]) -> str:
    """Tables of quality, differences, FLOPs and latency, and where they come from.

    Args:
        found: What the script writes as JSON.
    """
    arms, versions = found["arms"], ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = ["# Experts against other models", "", f"```bash\n{found['command']}\n```", ""]
    lines.append(f"{found['device']}; {versions}.")
    lines.append(f"Samples: {found['steps']} steps, guidance scale {found['guidance_scale']:g}.")
    if found["groups"]:
        lines.append(f"Groups of noise levels: those of `{found['groups_of']}`, 0 the noisiest.")
    if told := notes(arms):
        lines += ["", *(f"- {note}" for note in told)]
    for table in tables(found):
        lines += ["", f"## {table.title}", "", table.to_markdown()]
    return "\n".join(lines) + "\n"


def tables(found: Mapping[str, Any]) -> list[Table]:
    """All of them."""
    arms, base = found["arms"], next(iter(found["arms"]))
    nats: dict[str, Any] = {"all noise levels": lambda run: run["nats"]}
    for index, group in enumerate(found["groups"]):
        label = "group {}: log sigma {:.2f} to {:.2f}".format(group["number"], *group["log_sigma"])
        nats[label] = lambda run, index=index: run["group_nats"][index]
    higher = {name: of["higher_is_better"] for run in _runs(arms) for name, of in run["metrics"].items()}
    metrics = {name: lambda run, name=name: run["metrics"].get(name, {}).get("value") for name in higher}
    over = f"mean (lowest to highest) over {_seeds(arms)}"
    pages = [_values(f"Held-out nats, lower is better: {over}", arms, nats)]
    pages += [_values(f"Metrics of samples: {over}", arms, metrics)] * bool(metrics)
    if len(arms) > 1:
        pages.insert(1, _differences(f"Held-out nats, against {base} seed by seed", arms, nats, {}))
        if metrics:
            pages.append(_differences(f"Metrics of samples, against {base} seed by seed", arms, metrics, higher))
    return [*pages, _costs(found, base), _networks(arms)]


def notes(arms: Arms) -> list[str]:
    """What has to be known to read the numbers."""
    found = []
    for name, runs in arms.items():
        sources = sorted({run["started_from"] for run in runs.values() if run["started_from"]})
        if sources:
            found.append(f"{name} started from the weights of {', '.join(sources)}, whose training is not counted.")
        if any(run["pruned_while_trained"] for run in runs.values()):
            found.append(
                f"{name} lost blocks while it trained; its training FLOPs are counted as if it had none of them."
            )
    first = next(iter(_runs(arms)))
    metrics = [Metric.from_json(metric) for metric in first["metrics"].values()]
    found += [f"`{'`, `'.join(names)}`: {text}." for names, text in origins(metrics)]
    if names := reduced(metrics):
        found.append(f"Reduced size: compare `{'`, `'.join(names)}` with numbers of the same origin only.")
    return found


def _values(title: str, arms: Arms, values: Values) -> Table:
    rows = [[name, *(spread_text(_spread(runs, value)) for value in values.values())] for name, runs in arms.items()]
    return Table(title, ["arm", *values], rows)


def _differences(title: str, arms: Arms, values: Values, higher: Mapping[str, bool | None]) -> Table:
    """Of the seeds that both have; and in how many the arm is better."""
    base, *others = arms
    rows = []
    for name in others:
        cells = []
        for label, value in values.items():
            own, other = _spread(arms[name], value).by_seed, _spread(arms[base], value).by_seed
            gap = Spread({seed: own[seed] - other[seed] for seed in own if seed in other})
            wins = sum(change > 0 if higher.get(label) else change < 0 for change in gap.by_seed.values())
            cells.append(f"{difference_text(gap)}, better in {wins} of {len(gap.by_seed)}" if gap else "-")
        rows.append([name, *cells])
    return Table(title, ["arm", *values], rows)


def _costs(found: Mapping[str, Any], base: str) -> Table:
    """FLOPs and latency, each also as a share of the first arm's, seed by seed or turn by turn."""
    arms, latency = found["arms"], found["latency"]
    header = ["arm", "training", f"/ {base}", "sampling an image", f"/ {base}"]
    if latency:
        header += [f"seconds an image, batch {latency['batch']}", f"/ {base}"]
    rows = []
    for name, runs in arms.items():
        row = [name]
        for value in (lambda run: run["training_flops"]["total"], lambda run: run["sampling_flops"]):
            own, other = _spread(runs, value), _spread(arms[base], value).by_seed
            shares = Spread({seed: each / other[seed] for seed, each in own.by_seed.items() if seed in other})
            row += [_between(own.mean, own.low, own.high, flops), spread_text(shares)]
        if latency:
            for values in (latency["seconds_per_image"][name], latency["ratios"][name]):
                row.append(_between(statistics.median(values), min(values), max(values), number))
        rows.append(row)
    title = "FLOPs: mean (lowest to highest) over seeds" + ("; latency: median (lowest to highest)" * bool(latency))
    return Table(title, header, rows)


def _networks(arms: Arms) -> Table:
    """What each arm's first seed consists of."""
    rows = []
    for name, runs in arms.items():
        seed, run = next(iter(runs.items()))
        parts = [
            f"{key} {flops(cost)}" for key, cost in run["training_flops"].items() if key not in ("total", "budget")
        ]
        each = zip(run["parameters"], run["forward_flops"], run["calls"], strict=True)
        for index, (parameters, cost, calls) in enumerate(each):
            label = f"{name}, expert {index}" if len(run["calls"]) > 1 else name
            row = [label, str(seed), f"{parameters:,}", flops(cost), str(calls)]
            rows.append([*row, f"{calls * cost / run['sampling_flops']:.1%}", "; ".join(parts) if index == 0 else ""])
    header = ["network", "seed", "parameters", "one forward pass", "passes for an image", "of the sampling FLOPs"]
    return Table("The networks", [*header, "training"], rows)


def _between(middle: float, low: float, high: float, text: Callable[[float], str]) -> str:
    return text(middle) if text(low) == text(high) else f"{text(middle)} ({text(low)} to {text(high)})"


def _spread(runs: Mapping[int, Run], value: Callable[[Run], float | None]) -> Spread:
    found = {seed: value(run) for seed, run in runs.items()}
    return Spread({seed: each for seed, each in found.items() if each is not None})


def _runs(arms: Arms) -> list[Run]:
    return [run for runs in arms.values() for run in runs.values()]


def _seeds(arms: Arms) -> str:
    seeds = sorted({int(seed) for runs in arms.values() for seed in runs})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
