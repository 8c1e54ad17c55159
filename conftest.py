"""Hooks for notebooks under test. They live at the root, because tests/conftest.py does not reach notebooks/."""

import pytest


def pytest_collectstart(collector):
    """Compare no stderr: warnings carry process numbers, and the kernel has some of its own."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With `-n 2 --dist loadgroup`: one worker runs all notebooks in order, since later ones read what earlier ones wrote.

    Tests stay together by module, where they share fixtures. Notebooks go first: they are the longest sequence.
    """
    for item in items:
        in_notebook = item.path.suffix == ".ipynb"
        item.add_marker(pytest.mark.xdist_group("notebooks" if in_notebook else item.path.stem))
    items.sort(key=lambda item: item.path.suffix != ".ipynb")
