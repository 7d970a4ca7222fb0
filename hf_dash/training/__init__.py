"""Training one round to convergence with Accelerate, and what a model remembers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
