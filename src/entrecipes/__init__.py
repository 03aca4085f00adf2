"""Training recipes for diffusion and flow models, in which measured information decides where compute goes."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Loaded on demand, so that listing and validating recipes never imports torch. diffusers looks the classes of a
# model_index.json up here by name, and the mixins beside them tell it how they load.
_LAZY = {
    "SchedulerMixin": "diffusers",
    "ModelMixin": "diffusers",
    "DiffusionPipeline": "diffusers",
    "InfoNoiseScheduler": "entrecipes.noise.scheduler",
    "SequenceTransformer1DModel": "entrecipes.models.sequence",
    "SequencePipeline": "entrecipes.models.sequence",
    "PoseVideoPipeline": "entrecipes.models.pose_video",
    "DFGNModel": "entrecipes.models.dfgn",
    "StickerPipeline": "entrecipes.models.sticker",
    "TimestepExperts": "entrecipes.models.experts",
    "ExpertsPipeline": "entrecipes.models.experts_pipeline",
    "SimDA": "entrecipes.models.simda",
    "I2VAdapter": "entrecipes.models.i2v_adapter",
    "SlimUNet2DModel": "entrecipes.models.slim",
    "SlimDiTTransformer2DModel": "entrecipes.models.slim",
    "score_blocks": "entrecipes.evaluation.scoring",
    "apply_pruning": "entrecipes.blocks.own_loop",
    "apply_block_schedule": "entrecipes.blocks.own_schedule",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'entrecipes' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
