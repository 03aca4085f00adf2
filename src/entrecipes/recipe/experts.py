"""`experts:` which networks serve which noise levels, and how they are made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from entrecipes.recipe.base import Count, Section, register, union
from entrecipes.recipe.prune import Draws

TDC, PROPOSERS = "entrecipes.experts.tdc", "entrecipes.experts.proposers"
PAPER = "TDC Training (arXiv 2312.13307)"

Ratio = Annotated[float, Field(gt=0, le=1)]
UnitKind = Literal["widths", "heads", "feed_forward", "blocks"]


@register("proposer", implementation=f"{PROPOSERS}:Uniform")
class UniformProposer(Section):
    """The same share of every unit: the baseline that searches nothing."""

    type: Literal["uniform"] = "uniform"


@register("proposer", implementation=f"{PROPOSERS}:Random")
class RandomProposer(Section):
    """Shares by chance."""

    type: Literal["random"] = "random"


@register("proposer", implementation=f"{PROPOSERS}:Sensitivity")
class SensitivityProposer(Section):
    """Keep the more of a unit, the more the loss rises when it is halved; measured in the first rounds."""

    type: Literal["sensitivity"] = "sensitivity"


@register("proposer", implementation=f"{PROPOSERS}:Evolution")
class EvolutionProposer(Section):
    """Cross and mutate the best plans in memory (mu + lambda), from uniform shares on."""

    type: Literal["evolution"] = "evolution"
    mutation: float = Field(0.2, gt=0, le=1)
    """Probability that a unit's share moves to a neighbouring level."""


@register("proposer", implementation=f"{PROPOSERS}:Tpe", paper="Bergstra et al. 2011")
class TpeProposer(Section):
    """Tree-structured Parzen estimator, by optuna (`entrecipes[search]`)."""

    type: Literal["tpe"] = "tpe"


@register("proposer", implementation="entrecipes.experts.llm:LanguageModel", paper="GENIUS (arXiv 2304.10970)")
class LanguageModelProposer(Section):
    """Ask a language model, showing it the plans in memory with their losses; evolution where it gives no valid one."""

    type: Literal["llm"] = "llm"
    model: str
    """A transformers text-generation model (Hub id or folder), or the model's name at `endpoint`."""
    endpoint: str | None = None
    """Base address of a server that speaks the chat-completions API (`.../v1`); null: run `model` here. Its key is read
    from the environment variable `OPENAI_API_KEY`, where that is set."""
    temperature: float = Field(0.0, ge=0)
    """Of the sampling; 0 takes the likeliest answer."""
    max_new_tokens: int = Field(2048, ge=16)
    """Longest answer: a plan takes about six tokens a unit."""
    repairs: int = Field(2, ge=0)
    """How often an answer that is no plan is sent back with what is wrong."""
    timeout: float = Field(60.0, gt=0)
    """Seconds to wait for each answer of the endpoint."""


ProposerSection = union("proposer")


class Memory(Section):
    """What a proposer is shown of the trials so far."""

    best: int = Field(8, ge=1)
    """The best ones."""
    last: int = Field(4, ge=0)
    """The latest ones."""


class Recovery(Section):
    """A short fine-tune of each candidate before it is measured, since the loss right after cutting ranks poorly."""

    steps: int = Field(20, ge=0)
    """Optimizer steps; 0: none."""
    batch_size: int = Field(32, ge=1)
    """Images in each."""
    learning_rate: float = Field(3e-4, gt=0)
    """Of AdamW."""


class Search(Section):
    """Proxy-based pruning: for each group, which units of the base keep how much, under the group's FLOPs."""

    proposer: ProposerSection = EvolutionProposer()
    """Who proposes plans."""
    rounds: int = Field(10, ge=1)
    """Rounds of proposals for each group."""
    candidates: int = Field(4, ge=1)
    """Plans in each round."""
    memory: Memory | None = Memory()
    """What is remembered from round to round; null: nothing (the ablation)."""
    units: tuple[UnitKind, ...] = Field(("widths", "heads", "feed_forward"), min_length=1)
    """What may shrink: channels inside a UNet's resnet blocks, attention heads, inner features of feed-forward layers,
    and whole blocks."""
    levels: tuple[Ratio, ...] = Field((1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25), min_length=2)
    """Shares that a unit may keep, before the plan is fitted to the budget."""
    criterion: Literal["magnitude", "taylor", "diff_pruning", "random"] = "taylor"
    """Which channels, heads and features of a unit stay: those of the largest weights, of the largest |weight *
    gradient| over the group's noise levels, the same over levels until the loss falls below `threshold` of the largest
    (Diff-Pruning, arXiv 2305.10924), or any."""
    threshold: float = Field(0.05, ge=0, lt=1)
    """Of `diff_pruning`."""
    tolerance: float = Field(0.02, gt=0, lt=0.5)
    """How far a plan's FLOPs may be from the group's budget, as a share of it."""
    penalty: float = Field(1.0, ge=0)
    """Weight of FLOPs above the budget in the reward."""
    recovery: Recovery = Recovery()
    """Training of each candidate before it is measured."""
    draws: Draws = Draws(images=64, noise_levels=8)
    """What candidates are measured on: training images, at noise levels of the group."""


@register("experts", implementation=f"{TDC}:OneNetwork")
class OneNetworkSection(Section):
    """One network for all noise levels."""

    type: Literal["none"] = "none"


@register("experts", implementation=f"{TDC}:Member", paper="eDiff-I (arXiv 2211.01324)")
class MemberSection(Section):
    """Train one expert: only the noise levels of its group are drawn and measured. `tdc` writes such recipes."""

    type: Literal["member"] = "member"
    log_sigma: tuple[float, float]
    """Lowest and highest noise level that it trains on, the overlap included."""
    number: int = Field(0, ge=0)
    """Its number in the pipeline, 0 serving the noisiest levels."""

    @model_validator(mode="after")
    def _has_width(self) -> MemberSection:
        if not self.log_sigma[0] < self.log_sigma[1]:
            raise ValueError(f"log_sigma: {list(self.log_sigma)} is empty; give [lowest, highest]")
        return self


@register("experts", implementation=f"{TDC}:Tdc", paper=PAPER)
class TdcSection(Section):
    """Train a base, prune it to one network for each group of noise levels, fine-tune each within its group."""

    type: Literal["tdc"] = "tdc"
    groups: int = Field(5, ge=1, le=100)
    """Number of groups and so of experts."""
    by: Literal["timestep", "snr", "information"] = "timestep"
    """Groups of equal shares of the scheduler's training time, of equal range of log SNR, or of equal information: nats
    of the base's measured profile (our own)."""
    k: Ratio | None = None
    """Share of the base's FLOPs at the small end: group i of N gets (i/N + (N-i)/N k) F. Null: 0.5, or what `mean` asks
    for. 1 is experts without pruning."""
    mean: Ratio | None = None
    """In place of `k`: the expected FLOPs of a sampling step as a share of the base's; k follows."""
    ratios: tuple[Ratio, ...] | None = None
    """In place of both: each group's share of the base's FLOPs, the noisiest group first."""
    big_end: Literal["low_noise", "high_noise"] = "low_noise"
    """Which end gets the largest network."""
    base_share: float = Field(0.5, gt=0, lt=1)
    """Share of the budget, `training.images`, that the base is trained for."""
    base: str | None = None
    """A finished run folder of exactly that base, in place of training it; its FLOPs count all the same."""
    spend: Literal["flops", "images"] = "flops"
    """What the rest of the budget means for the experts: as many images as the FLOPs of a base trained for all of
    `training.images` leave after base and search, or (published) the images that such a base would still see, so that
    training gets cheaper too."""
    split: Literal["steps", "information", "equal"] = "steps"
    """How the experts share that: by their shares of the scheduler's training time, by the nats that the base's
    measured profile has in each group (our own), or equally."""
    overlap: float = Field(0.0, ge=0, lt=1)
    """Noise levels beyond its borders that an expert also trains on, on each side, as a share of its group's width in
    log sigma."""
    search: Search = Search()
    """How each network is found."""
    decay: Literal["each", "joint"] = "each"
    """The learning rate decays over the base's run and over each expert's anew, or once over both: the base ends where
    the whole budget's decay is by then, and the experts go on from there (our own; take `learning_rate: 1` with it)."""
    learning_rate: float = Field(0.5, gt=0)
    """Factor on the optimizer's learning rate for the experts."""
    warmup: Count | None = None
    """Images over which an expert's learning rate rises; null: a twentieth of its own."""
    stop_after: Literal["base", "search", "experts"] | None = None
    """Stop there; the same command without it goes on. After `search`, each expert's own recipe lies in the run folder
    and can be launched by itself, on any machine."""
    stock: bool = True
    """Also publish each expert as a stock model, zeros in the place of missing channels (lost DiT blocks stay lost):
    the same outputs in plain diffusers, not faster."""

    @model_validator(mode="after")
    def _one_budget(self) -> TdcSection:
        given = [name for name in ("k", "mean", "ratios") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{given[1]}: has no place beside {given[0]}, which already sets the budgets; set one of them to null"
            )
        if self.ratios and len(self.ratios) != self.groups:
            raise ValueError(f"ratios: {len(self.ratios)} given for {self.groups} groups; give one for each")
        return self

    @property
    def prunes(self) -> bool:
        """Whether any expert is smaller than the base."""
        if self.ratios:
            return any(ratio != 1 for ratio in self.ratios)
        return self.mean != 1 if self.mean else self.k != 1 and self.groups > 1


ExpertsSection = union("experts")
