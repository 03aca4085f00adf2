"""Keys that change nothing in the combination that a recipe chose."""

from __future__ import annotations

from collections.abc import Iterator

from entrecipes.recipe.blocks import EntProgSection, StagedBlocksSection
from entrecipes.recipe.data import FolderData, HubData, PreparedData, VideoData
from entrecipes.recipe.experts import TdcSection
from entrecipes.recipe.prune import UNMEASURED, EntPrunerSection, RankedKeys
from entrecipes.recipe.schema import Recipe

_WEIGHTING_KEYS = {"sigma_data": "edm", "min_snr_gamma": "min_snr", "p2_gamma": "p2", "p2_k": "p2"}
_METRIC_KEYS = ("features", "samples", "reference", "reference_samples")


def idle_keys(recipe: Recipe) -> dict[str, str]:
    """Dotted keys without effect in this recipe, set or not, each with the reason."""
    return dict(
        [
            *_model(recipe),
            *_blocks(recipe),
            *_pruning(recipe),
            *_experts(recipe),
            *_data(recipe),
            *_measuring(recipe),
            *_hub(recipe),
        ]
    )


def _hub(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.hub.repo_id is None:
        for key in ("private", "revision", "what", "checkpoints"):
            yield f"hub.{key}", "without hub.repo_id"


def _model(recipe: Recipe) -> Iterator[tuple[str, str]]:
    weighting, schedule, images = recipe.objective.weighting, recipe.optimizer.schedule, recipe.training.images
    for key, owner in _WEIGHTING_KEYS.items():
        if weighting != owner:
            yield f"objective.{key}", f"with objective.weighting: {weighting}"
    if schedule.decay in ("constant", "inverse_sqrt"):
        yield "optimizer.schedule.final", f"with decay: {schedule.decay}"
        yield "optimizer.schedule.span", f"with decay: {schedule.decay}"
    if schedule.decay == "constant":
        yield "optimizer.schedule.decay_start", "with decay: constant"
    elif schedule.decay_start >= images:
        yield "optimizer.schedule.decay", f"when it starts after the run's {images} images"


def _blocks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    blocks, images = recipe.blocks, recipe.training.images
    if isinstance(blocks, StagedBlocksSection):
        for i, stage in enumerate(blocks.stages):
            if stage.from_images >= images:
                yield f"blocks.stages.{i}", f"when it starts after the run's {images} images"
        if "*" in blocks.stages[0].train:
            yield "blocks.closed.quantise", "when the first stage opens everything"
    if not isinstance(blocks, EntProgSection):
        return
    if blocks.growth == "none" and blocks.largest == 1:
        yield "blocks.closed.quantise", "with growth: none, which opens all blocks at once"
    if blocks.order != "cost_aware":
        yield "blocks.score", f"with order: {blocks.order}"
    elif blocks.inputs == "always" and blocks.adapter.type not in ("lora", "qlora"):
        yield "blocks.order", "with inputs: always, where gradients pass all blocks anyway; set inputs: never"
    if blocks.measured is None:
        yield "blocks.draws", f"with order: {blocks.order}"
        yield "blocks.rerank", f"with order: {blocks.order}"
    elif blocks.measured != "information":
        yield "blocks.draws.gate_pivot", f"with the score {blocks.measured}"
    if blocks.growth == "none":
        yield "blocks.stages", "with growth: none"
        if blocks.measured:
            yield "blocks.rerank", "with growth: none"
    if not blocks.searches:
        for key in ("step", "candidates", "final", "supernet", "mode", "clock", "burst", "holdout"):
            yield f"blocks.{key}", f"with growth: {blocks.growth}"
    elif blocks.mode == "snapshot":
        yield "blocks.burst", "with mode: snapshot"


def _pruning(recipe: Recipe) -> Iterator[tuple[str, str]]:
    prune = recipe.prune
    if not isinstance(prune, RankedKeys):
        return
    votes = prune.vote if isinstance(prune, EntPrunerSection) else None
    if prune.score in UNMEASURED:
        yield "prune.rerank", f"with score: {prune.score}"
        yield "prune.draws.noise_levels", f"with score: {prune.score}"
        if votes is None:
            yield "prune.draws.images", f"with score: {prune.score}"
            yield "prune.draws.seed", f"with score: {prune.score}"
    if prune.score != "information":
        yield "prune.draws.gate_pivot", f"with score: {prune.score}"
    if votes and not votes.ntk:
        yield "prune.vote.samples", "with vote.ntk: 0"
    if votes and not votes.zico and not (votes.cost and votes.measure == "seconds"):
        yield "prune.vote.batches", "with vote.zico: 0"
    if votes and not votes.cost:
        yield "prune.vote.measure", "with vote.cost: 0"


def _experts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    experts = recipe.experts
    if not isinstance(experts, TdcSection):
        return
    if not experts.prunes:
        yield "experts.search", "when no expert is smaller than the base"
    elif experts.search.criterion != "diff_pruning":
        yield "experts.search.threshold", f"with criterion: {experts.search.criterion}"
    if experts.search.units == ("blocks",):
        yield "experts.search.criterion", "with whole blocks only"
    if experts.search.recovery.steps == 0:
        yield "experts.search.recovery.batch_size", "with recovery.steps: 0"
        yield "experts.search.recovery.learning_rate", "with recovery.steps: 0"
    proposer = experts.search.proposer.type
    if proposer in ("uniform", "random") and experts.search.memory:
        yield "experts.search.memory", f"with the proposer {proposer}, which looks at none"
    if proposer in ("sensitivity", "tpe") and experts.search.memory:
        for key in ("best", "last"):
            yield f"experts.search.memory.{key}", f"with the proposer {proposer}, which is shown all trials"
    if proposer == "uniform" and experts.prunes:
        for key in ("rounds", "candidates", "levels"):
            yield f"experts.search.{key}", "with the proposer uniform, which has one plan"
    yield "evaluation.metrics_every", "with experts, which are measured when all are trained"
    yield "experts.search.draws.gate_pivot", "on the search, which measures the loss"
    if recipe.optimizer.schedule.decay in ("constant", "inverse_sqrt"):
        yield "experts.decay", f"with optimizer.schedule.decay: {recipe.optimizer.schedule.decay}"
    if experts.groups == 1:
        yield "experts.split", "with one group"
        yield "experts.by", "with one group"
        yield "experts.overlap", "with one group"
        if experts.k is not None:
            yield "experts.k", "with one group, which takes ratios or mean"
    if experts.ratios or experts.groups == 1:
        yield "experts.big_end", "with ratios" if experts.ratios else "with one group"


def _data(recipe: Recipe) -> Iterator[tuple[str, str]]:
    data = recipe.data
    if getattr(data, "on_device", None) == "always":
        yield "data.num_workers", "with on_device: always"
    if isinstance(data, FolderData | HubData | PreparedData):
        if data.label_column is None and data.caption_column is None:
            yield "training.label_dropout", "without data.label_column"
            yield "evaluation.guidance_scale", "without data.label_column"
    own_split = isinstance(data, HubData) and data.held_out_split is not None
    if own_split:
        yield "data.held_out", "with held_out_split"
    if isinstance(data, HubData) and not data.streaming:
        yield "data.shuffle_buffer", "without streaming: true"
    if isinstance(data, VideoData):
        if data.held_out_videos is not None:
            yield "data.held_out", "with held_out_videos"
    elif (own_split or not data.held_out) and data.max_images is None:
        yield "data.split_seed", "when nothing is split or drawn"


def _measuring(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if not recipe.evaluation.metrics:
        for key in _METRIC_KEYS:
            yield f"evaluation.{key}", "while evaluation.metrics is empty"
    elif recipe.data.kind == "sequences":
        yield "evaluation.features", "with sequences"
    elif recipe.data.kind in ("clips", "stickers"):
        yield "evaluation.reference_samples", "with clips, which are compared in pairs"
    if recipe.data.kind != "stickers":
        for key in ("task", "frame_guidance_scale"):
            yield f"evaluation.{key}", f"with {recipe.data.kind}"
    for key, metric in (("video_features", "fvd"), ("text_features", "text"), ("pose", "pose")):
        if metric not in recipe.evaluation.metrics:
            yield f"evaluation.{key}", f"without the metric {metric}"
