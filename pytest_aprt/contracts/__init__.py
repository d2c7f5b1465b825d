"""Contracts: YAML files of claims, each claim (a falsifier) a test.

``lines`` reads YAML, ``contract`` what the field writes in it, ``rules`` and ``validate`` judge
the file, ``checks`` and ``bindings`` the claims, ``items`` and ``plugin`` are the pytest face.
"""
