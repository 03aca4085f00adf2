"""`evaluate` module: improved precision and recall (Kynkaanniemi et al. 2019) between generated and real images."""

from entrecipes.evaluation import as_module  # by module: `evaluate` takes the first metric class named here


class PrecisionRecall(as_module.ImageMetric):
    __doc__ = __doc__
    measure = "precision_recall"
