"""Garbage collection around a run: put off, restored, and spared what stays."""

from __future__ import annotations

import gc
import weakref

import pytest

from pytest_aprt.garbage import seldom_collected


class Circle:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def thawed():
    before = gc.get_threshold()
    gc.unfreeze()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.mark.parametrize("threshold", [(700, 10, 10), (0, 10, 10), (80_000, 5, 5)])
def test_the_threshold_is_restored_and_never_lowered(threshold):
    gc.set_threshold(*threshold)
    with seldom_collected():
        within = gc.get_threshold()
    assert gc.get_threshold() == threshold
    assert within[0] >= threshold[0]
    assert bool(within[0]) == bool(threshold[0])  # who chose never, gets never


def test_what_lay_about_before_is_collected():
    freed = weakref.ref(Circle())
    with seldom_collected():
        assert freed() is None


def test_what_stays_is_looked_at_no_more():
    with seldom_collected():
        kept = Circle()
    assert gc.get_freeze_count() > 0
    assert not any(each is kept for each in gc.get_objects())


def test_what_a_later_run_leaves_is_collected():
    with seldom_collected():
        pass
    frozen = gc.get_freeze_count()
    with seldom_collected():
        left = weakref.ref(Circle())
    assert gc.get_freeze_count() <= frozen
    gc.collect()
    assert left() is None


def test_a_run_that_fails_restores_too():
    before = gc.get_threshold()
    with pytest.raises(ValueError, match="broken"), seldom_collected():
        raise ValueError("broken")
    assert gc.get_threshold() == before
