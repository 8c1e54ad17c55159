"""Hooks for notebooks under test. They live at the root, because tests/conftest.py does not reach notebooks/."""

import pytest


def pytest_collectstart(collector):
    """Compare no stderr: warnings carry process numbers, and the kernel has some of its own."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


def pytest_collection_modifyitems(items):
    """Notebooks first: they are the longest sequence, and must not start last."""
    items.sort(key=lambda item: item.path.suffix != ".ipynb")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n 2`: one worker runs all notebooks in order, since later ones read what earlier ones wrote.

    Tests stay together by module, where they share fixtures. (Groups by mark, `--dist loadgroup`, are lost under pytest
    9.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "notebooks" if ".ipynb::" in nodeid else nodeid.split("::", 1)[0]

    return Scheduler(config, log)
