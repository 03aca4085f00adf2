"""Training recipes for diffusion and flow models, in which measured information decides where compute goes."""

__version__ = "0.1.0"
