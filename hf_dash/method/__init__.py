"""The method: gradients over old and new data, factors, and the shrink."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
