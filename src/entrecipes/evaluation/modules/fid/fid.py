"""`evaluate` module: Frechet distance (Heusel et al. 2017) between generated and real images."""

from entrecipes.evaluation import as_module  # by module: `evaluate` takes the first metric class named here


class Fid(as_module.ImageMetric):
    __doc__ = __doc__
    measure = "fid"
