"""What the card and the report say of a run, in words: metrics with their origin, data, speed, versions."""

from __future__ import annotations

import re
from typing import Any

from entrecipes.evaluation.result import Metric
from entrecipes.report.run_folder import RunFolder

Rows = list[tuple[str, str]]


def metrics(folder: RunFolder) -> list[Metric]:
    """The final metrics of `run.json`; while the run goes on, the newest of each name from `metrics.jsonl`.

    Raises:
        UserError: For a number that is not finite, naming the metric: a NaN is never reported.
    """
    records = folder.run.get("metrics", []) if folder.has("run.json") else folder.metrics("metric")
    newest = {record["name"]: {key: record.get(key) for key in Metric.__annotations__} for record in records}
    return [Metric.from_json(record) for record in newest.values()]


def value(metric: Metric) -> str:
    """Value and spread for a table."""
    return number(metric.value) + (f" ± {number(metric.spread)}" if metric.spread is not None else "")


def reduced(metrics: list[Metric]) -> list[str]:
    """Names that tell an extractor or sample count (`kid_efflite0_1k`): no paper's FID or KID compares with them."""
    of_extractors = re.compile("(fid|kid|precision|recall|perceptual|fvd|kvd)_")
    return [metric.name for metric in metrics if of_extractors.match(metric.name)]


def origins(metrics: list[Metric]) -> list[tuple[list[str], str]]:
    """Where the numbers come from: for each feature extractor what its metrics share, then what single ones add.

    Returns:
        Pairs of metric names and their common facts in words.
    """
    groups: dict[Any, list[Metric]] = {}
    for metric in metrics:
        groups.setdefault(metric.origin.get("extractor"), []).append(metric)
    lines = []
    for group in groups.values():
        shared = dict(set.intersection(*(set(metric.origin.items()) for metric in group)))
        shared = {key: fact for key, fact in group[0].origin.items() if key in shared}
        lines.append(([metric.name for metric in group], _words(shared)))
        for metric in group:
            if own := {key: fact for key, fact in metric.origin.items() if key not in shared}:
                lines.append(([metric.name], _words(own)))
    return [(names, text) for names, text in lines if text]


def held_out_text(folder: RunFolder) -> str:
    """The last and the best held-out nats, and the bundle on which they were measured; empty before the first."""
    rows = folder.metrics("held_out")
    if not rows:
        return ""
    last, best = rows[-1], min(rows, key=lambda row: row["nats"])
    which = "Nats on training images" if last.get("split") == "train" else "Held-out nats"
    error = last.get("nats_standard_error")
    text = f"{which}: {number(last['nats'])}" + ("" if error is None else f" (standard error {number(error)})")
    things = unit(folder.run) if folder.has("run.json") else "images"
    text += f" at {last['images']:,} {things}, "
    text += "the best of the run" if best is last else f"best {number(best['nats'])} at {best['images']:,} {things}"
    return f"{text}. Lower is better. {_bundle(folder)}".strip()


def _bundle(folder: RunFolder) -> str:
    bundle = dict(folder.recipe.get("evaluation", {}).get("held_out", {})) if folder.has("recipe.yaml") else {}
    if "images" in bundle and folder.has("run.json"):
        bundle["images"] = min(bundle["images"], folder.run["data"]["held_out_images"] or bundle["images"])
    texts = {
        "images": "{:,} images",
        "noise_levels": "{} noise levels",
        "gate_pivot": "gate pivot {}",
        "seed": "seed {}",
    }
    known = [text.format(bundle[key]) for key, text in texts.items() if bundle.get(key) is not None]
    return f"Fixed bundle: {', '.join(known)}." if known else ""


def noise_schedule_text(folder: RunFolder) -> str:
    """Where a learned noise schedule ended; empty for a fixed one."""
    rows = folder.metrics("noise")
    if not rows:
        return ""
    last = rows[-1]
    low, *_, high = last["quantiles"]
    text = f"After {last['images']:,} images, 90 % of the draws lie between sigma {low:.3g} and {high:.3g}"
    if last["pivot"] is not None:
        text += f", and {100 * last['below_pivot']:.0f} % of all below the pivot, {last['pivot']:.3g}"
    return f"{text}."


def data_rows(run: dict[str, Any]) -> Rows:
    """Name, source, licence and counts of the data."""
    data = run["data"]
    labels, things = data.get("label_names") or None, unit(run)
    bad = data.get("bad_images")
    return _rows(
        ("Data set", data.get("name")),
        ("Source", data.get("source")),
        ("Licence of the data", data.get("license")),
        (f"Training {things}", _count(data.get("train_images"))),
        (f"Held-out {things}", _count(data.get("held_out_images"))),
        ("Classes", labels and f"{len(labels)}: {', '.join(map(str, labels[:20]))}{', ...' * (len(labels) > 20)}"),
        ("Bad images or clips left out", _count(len(bad) if isinstance(bad, list) else bad) if bad else None),
    )


def speed_rows(run: dict[str, Any]) -> Rows:
    """Size, speed and memory."""
    parameters, trainable = run.get("parameters"), run.get("trainable_parameters")
    return _rows(
        (f"{unit(run).capitalize()} seen in training", _count(run.get("images"))),
        ("Batch size", _count(run.get("batch_size"))),
        ("Parameters", parameters and f"{parameters:,}, of them trained {trainable:,}"),
        ("Speed (median)", (speed := run.get("images_per_second")) and f"{number(speed)} {unit(run)}/s"),
        ("Peak memory", (memory := run.get("peak_memory_gib")) and f"{number(memory)} GiB"),
        ("Time in training steps", duration(run.get("seconds_training"))),
        ("Device", run.get("device")),
        ("Processes", _count(run.get("world_size"))),
        ("Precision", {"no": "float32"}.get(run.get("precision"), run.get("precision"))),
    )


def environment_rows(run: dict[str, Any]) -> Rows:
    """Seed and versions."""
    return _rows(("Seed", run.get("seed")), *run["versions"].items())


FILM_STRIPS = {
    "clips": "Film strips: the pose maps asked for, below them the real clip with the reference image at its left, "
    "then the generated clip",
    "stickers": "Film strips: the frames that are given (the others grey), below them the real clip, then the "
    "generated one",
}
MOVING = {
    "clips": "A clip a row: reference image, pose map, real frame, generated frame",
    "stickers": "A clip a row: what is given (grey: nothing), the real frame, the generated one",
}
"""What the samples of clips show, still and moving."""


def unit(run: dict[str, Any]) -> str:
    """What is counted: `images` or `clips`."""
    return "clips" if run["pipeline"].get("kind") in MOVING else "images"


def captions(folder: RunFolder) -> list[str]:
    """The texts of the newest sample grid's clips, from the top; empty where it has none."""
    path = folder.samples[-1][1].with_suffix(".txt") if folder.samples else None
    return path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []


def number(value: float) -> str:
    """Four significant digits; thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def flops(value: float) -> str:
    """`321.3 MFLOP`, operations of floating-point arithmetic."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{number(value / limit)} {prefix}FLOP"
    return f"{number(value)} FLOP"


def duration(seconds: float | None) -> str | None:
    """`3 min 20 s`."""
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _words(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {fact}" for key, fact in facts.items() if fact is not None)


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _rows(*pairs: tuple[str, Any]) -> Rows:
    return [(label, str(value)) for label, value in pairs if value is not None and value != ""]
