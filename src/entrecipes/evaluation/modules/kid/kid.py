"""`evaluate` module: kernel distance (Binkowski et al. 2018) between generated and real images."""

from entrecipes.evaluation import as_module  # by module: `evaluate` takes the first metric class named here


class Kid(as_module.ImageMetric):
    __doc__ = __doc__
    measure = "kid"
