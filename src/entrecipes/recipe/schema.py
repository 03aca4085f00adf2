"""The whole recipe, and the checks that span its sections."""

from __future__ import annotations

import re

from pydantic import model_validator

from entrecipes.recipe.base import Section
from entrecipes.recipe.blocks import AllBlocksSection, BlocksSection, EntProgSection, StagedBlocksSection
from entrecipes.recipe.curriculum import CurriculumSection, NoCurriculumSection, TaskCurriculumKeys
from entrecipes.recipe.data import DataSection
from entrecipes.recipe.evaluation import METRICS, Evaluation
from entrecipes.recipe.experts import ExpertsSection, MemberSection, OneNetworkSection, TdcSection
from entrecipes.recipe.hub import Hub
from entrecipes.recipe.masks import MasksSection, NoMasksSection
from entrecipes.recipe.noise import NoiseSection, UniformNoise
from entrecipes.recipe.pipeline import KIND_OF_MODEL, Objective, Pipeline
from entrecipes.recipe.prune import NoPruningSection, PruneSection
from entrecipes.recipe.training import AdamWOptimizer, OptimizerSection, Training


class Recipe(Section):
    """Everything that decides what a run does."""

    description: str
    """One line for `entrecipes ls` and the model card."""
    license: str = "apache-2.0"
    """Licence of the trained weights, for the model card."""
    plugins: tuple[str, ...] = ()
    """Python modules of your own, imported first: in the working directory or installed. What they register can be
    chosen."""
    pipeline: Pipeline
    """Which network is trained, on which noise path."""
    data: DataSection
    """What is trained on."""
    objective: Objective = Objective()
    """The loss."""
    noise: NoiseSection = UniformNoise()
    """Which noise levels are trained."""
    blocks: BlocksSection = AllBlocksSection()
    """Which weights are trained, and from when."""
    prune: PruneSection = NoPruningSection()
    """Which blocks are removed, and when."""
    experts: ExpertsSection = OneNetworkSection()
    """Which networks serve which noise levels."""
    curriculum: CurriculumSection = NoCurriculumSection()
    """Which part of each sample is trained on, and when."""
    masks: MasksSection = NoMasksSection()
    """Which frames of a sticker are given, and which count."""
    optimizer: OptimizerSection = AdamWOptimizer()
    """How the weights move."""
    training: Training
    """The run."""
    evaluation: Evaluation = Evaluation()
    """How the run is measured."""
    hub: Hub = Hub()
    """Where the results are pushed to."""

    @model_validator(mode="after")
    def _no_idle_keys(self) -> Recipe:
        problems = []
        training, evaluation = self.training, self.evaluation
        if training.micro_batch_size and training.batch_size % training.micro_batch_size:
            problems.append(f"training.batch_size: must be a multiple of micro_batch_size {training.micro_batch_size}")
        if evaluation.metrics_every and not evaluation.metrics:
            problems.append("evaluation.metrics_every: has no effect while evaluation.metrics is empty")
        if (
            evaluation.metrics
            and evaluation.reference == "held_out"
            and not (self.data.held_out or getattr(self.data, "held_out_split", None))
        ):
            problems.append("evaluation.reference: 'held_out' needs data.held_out above 0")
        problems += (
            self._kind_problems() + self._sticker_problems() + self._adapter_problems() + self._expert_problems()
        )
        if self.prune.type != "none" and isinstance(self.blocks, StagedBlocksSection):
            numbered = [name for stage in self.blocks.stages for name in stage.train if re.search(r"\d", name)]
            problems += [f"blocks: '{name}' names a block by number, which prune changes" for name in numbered]
            if self.blocks.closed.quantise:
                problems.append("blocks.closed.quantise: not with prune, which removes blocks; set null")
        if isinstance(self.blocks, EntProgSection):
            if self.prune.type != "none":
                problems.append(
                    "prune: changes the blocks that blocks.type: entprog has put in order; take one of them"
                )
            if self.blocks.searches and self.blocks.mode == "snapshot" and self.curriculum.type != "none":
                problems.append("blocks.mode: snapshot can't go back over a phase of the curriculum; take supernet")
        if getattr(self.noise, "warmup", None) and self.noise.warmup >= training.images:
            problems.append("noise.warmup: lasts the whole run, so that nothing would be learned; make it shorter")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _adapter_problems(self) -> list[str]:
        """Adapters change a trained model a little, and those beside it need it whole."""
        adapter = self.blocks.adapter
        if adapter.type == "none":
            return []
        problems = []
        if self.pipeline.pretrained is None:
            problems.append(
                f"blocks.adapter.type: '{adapter.type}' adapts a trained model, but pipeline.build makes one; give "
                "pipeline.pretrained, or take none"
            )
        if self.prune.type != "none" and adapter.type in ("simda", "i2v_adapter"):
            problems.append(f"prune.type: removes what {adapter.type} would lie beside; take none")
        if self.prune.type != "none" and not getattr(adapter, "merge", True):
            problems.append(
                "blocks.adapter.merge: must be true with prune, which removes blocks of the base that an adapter alone "
                "would be loaded on"
            )
        return problems

    def _expert_problems(self) -> list[str]:
        """Experts are whole networks, each of which sees its own noise levels only."""
        experts = self.experts
        if isinstance(experts, MemberSection) and self.evaluation.metrics:
            return ["evaluation.metrics: one expert does not sample alone; leave them to the pipeline of all"]
        if not isinstance(experts, TdcSection):
            return []
        beside = {
            "blocks": "all" if self.blocks.type != "all" else None,
            "blocks.adapter": "none" if self.blocks.adapter.type != "none" else None,
            "prune": "none" if self.prune.type != "none" else None,
            "curriculum": "none" if self.curriculum.type != "none" else None,
        }
        problems = [
            f"{key}.type: experts.type tdc trains whole networks and prunes them itself; take {only}"
            for key, only in beside.items()
            if only
        ]
        if self.data.kind != "images":
            problems.append(f"experts.type: tdc makes experts for images only so far, not for {self.data.kind}")
        if getattr(self.data, "streaming", False):
            problems.append("data.streaming: the search of experts draws chosen training images; set it to false")
        return problems

    def _sticker_problems(self) -> list[str]:
        """Masks, tasks and texts are for captioned clips, and go together."""
        stickers, tasks = self.data.kind == "stickers", isinstance(self.curriculum, TaskCurriculumKeys)
        masks, build = self.masks, self.pipeline.build
        problems = []
        if masks.type != "none" and not stickers:
            problems.append(f"masks.type: '{masks.type}' is for stickers, not for {self.data.kind}; take none")
        if masks.type == "dual" and stickers and masks.lengths[1] != self.data.frames:
            problems.append(
                f"masks.lengths: up to {masks.lengths[1]} frames, but data.frames is {self.data.frames}: others do not "
                f"exist, or would never be trained; set [{min(masks.lengths[0], self.data.frames)}, {self.data.frames}]"
            )
        if tasks and masks.type == "none":
            other = "take that, or curriculum.type: none" if stickers else "take none"
            problems.append(
                f"curriculum.type: '{self.curriculum.type}' chooses among the tasks of masks.type: dual; {other}"
            )
        if tasks and masks.type == "dual" and len(masks.tasks) == 1:
            problems.append(f"curriculum.type: '{self.curriculum.type}' has one task in masks.tasks; take none")
        task = self.evaluation.task
        if stickers and "given" in self.evaluation.metrics and task in ("t2v", "uncond"):
            problems.append(
                f"evaluation.metrics: 'given' needs given frames, and evaluation.task {task} has none; leave it out"
            )
        if stickers and self.training.channels_last:
            problems.append("training.channels_last: clips have five dimensions; leave it out")
        if stickers and self.training.label_dropout:
            problems.append("training.label_dropout: stickers have no labels; masks.type: dual drops their texts")
        if build and build.text and not stickers:
            problems.append("pipeline.build.text: only a DFGNModel follows texts; leave it out")
        if self.blocks.adapter.type in ("simda", "i2v_adapter") and not stickers:
            problems.append(f"blocks.adapter.type: '{self.blocks.adapter.type}' is for models of stickers; take lora")
        return problems

    def _kind_problems(self) -> list[str]:
        """Images, sequences and clips need models and metrics of their own."""
        kind, build = self.data.kind, self.pipeline.build
        allowed = METRICS[kind]
        among = " or ".join(filter(None, [", ".join(allowed[:-1]), allowed[-1]]))
        problems = [
            f"evaluation.metrics: '{name}' is not measured on {kind}; take {among}"
            for name in self.evaluation.metrics
            if name not in allowed
        ]
        measured = kind in ("clips", "stickers") and self.evaluation.metrics and not problems
        if measured and self.data.held_out and "reference" not in self.evaluation.model_fields_set:
            problems.append(
                "evaluation.reference: by default generated clips are asked for with clips that were trained on; set "
                "held_out (or train, if that is meant)"
            )
        model = build and build.model.class_name
        if build and KIND_OF_MODEL[model] != kind:
            fit = next((name for name, of in KIND_OF_MODEL.items() if of == kind), "another model")
            problems.append(
                f"pipeline.build.model.class: {model} does not denoise {kind}, which data.type {self.data.type} holds; "
                f"take {fit}"
            )
        return problems
