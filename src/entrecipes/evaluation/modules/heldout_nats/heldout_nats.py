"""`evaluate` module: nats from squared x0 errors at noise levels, the gated integral over log sigma."""

import datasets
import evaluate

from entrecipes.evaluation.as_module import NATS_ARGUMENTS, nats_of_pairs


class HeldoutNats(evaluate.Metric):
    """Thin wrapper of entrecipes.evaluation.heldout: predictions are x0 errors, references their log sigma."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=NATS_ARGUMENTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references, gate_pivot=0.2) -> dict:
        return nats_of_pairs(predictions, references, gate_pivot)
