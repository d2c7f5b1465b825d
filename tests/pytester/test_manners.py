"""How the plugin behaves among pytest's options and other plugins, in a user's own suite."""

from __future__ import annotations


def test_first(faulty):
    result = faulty("--durations=0")
    print(result.parseoutcomes(), faulty.runs())


def test_second(faulty):
    result = faulty("-n2", "--durations=0")
    print(result.parseoutcomes(), faulty.runs())
    result = faulty("-n2", "--durations=0", subprocess=True)
    print(result.parseoutcomes(), faulty.runs())
