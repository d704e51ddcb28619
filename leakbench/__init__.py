"""leakbench measures what shared gradients leak in federated learning.

Names are imported on first use, so that ``import leakbench`` costs nothing; ``__init__.pyi`` says where each lives.
"""

import lazy_loader

from leakbench.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
