"""Attacks and generators of test modules run like those of leakbench; ``test_cheats`` has attacks of plugin files.

``conftest`` imports this, and so does ``test_engine``, which worker processes import.
"""

from leakbench.engine import isolation

_shipped = isolation.shipped
isolation.shipped = lambda cls: cls.__module__.startswith(("test_", "conftest")) or _shipped(cls)
