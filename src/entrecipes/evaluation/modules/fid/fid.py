"""`evaluate` module: Frechet distance (Heusel et al. 2017) between generated and real images."""

import datasets
import evaluate

from entrecipes.evaluation.as_module import ARGUMENTS, compare_images


class Fid(evaluate.Metric):
    """Thin wrapper of entrecipes.evaluation.metrics.compare; predictions and references are images."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=ARGUMENTS,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions, references, features="efficientnet_lite0", batch_size=250, seed=0) -> dict:
        return compare_images("fid", predictions, references, features, batch_size, seed)
