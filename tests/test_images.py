"""Differences as images: what is pooled, what the levels mean, what is not finite."""

from __future__ import annotations

import base64

import pytest
import torch
from report_cases import point_of, report_of

from pytest_aprt.images import DECADES, LARGEST, NON_FINITE, image_of, picture_of


def image(difference, axes=("token", "channel"), bad=None):
    bad = torch.zeros_like(difference, dtype=torch.bool) if bad is None else bad
    return image_of([picture_of(difference, bad, axes)], axes)


def test_a_level_is_a_share_of_the_decades():
    found = image(torch.tensor([[1.0, 0.1], [10.0**-DECADES, 0.0]]))
    assert list(found.levels) == [254, round(254 * (1 - 1 / DECADES)), 0, 0]
    assert (found.rows, found.columns, found.shape, found.pixels) == (
        "token",
        "channel",
        (2, 2),
        (2, 2),
    )
    assert found.largest == 1.0


def test_the_scale_is_that_of_the_largest():
    small = image(torch.tensor([[1e-9, 1e-10]], dtype=torch.float64))
    assert small.levels[0] == 254
    assert small.levels[1] == round(254 * (1 - 1 / DECADES))


@pytest.mark.parametrize("columns", [5000, 70 * LARGEST])
def test_one_bright_element_survives_pooling(columns):
    difference = torch.zeros(3, columns)
    difference[1, 4321] = 2.0
    found = image(difference)
    assert found.pixels == (3, LARGEST)
    assert len(found.levels) == 3 * LARGEST
    assert found.levels.count(254) == 1
    assert found.levels[LARGEST + 4321 * LARGEST // columns] == 254


def test_heads_lie_beside_each_other_and_scores_over_each_other():
    assert image(torch.ones(2, 3, 4), ("token", "head", "channel")).shape == (2, 12)
    found = image(torch.eye(3)[None].repeat(5, 1, 1), ("head", "token", "key"))
    assert (found.rows, found.columns, found.shape) == ("token", "key", (3, 3))
    assert list(found.levels) == [254, 0, 0, 0, 254, 0, 0, 0, 254]


def test_what_is_not_finite_has_a_level_of_its_own():
    bad = torch.tensor([[False, True]])
    assert list(image(torch.tensor([[0.5, 0.0]]), bad=bad).levels) == [254, NON_FINITE]
    assert list(image(torch.tensor([[0.0, 0.0]]), bad=bad).levels) == [0, NON_FINITE]


@pytest.mark.parametrize("difference", [torch.zeros(2, 3), torch.ones(7), torch.ones(0, 3)])
def test_nothing_to_see_is_no_image(difference):
    assert image(difference, ("token", "channel")[: difference.ndim]) is None


def test_origins_and_a_few_inherited_points_have_one_in_the_report():
    report = report_of("fault")
    shown = {p["point"]: p["image"]["error"] for p in report["points"] if p["image"]}
    assert shown["L02-k_post_rope"] == shown["L02-attn_out"] == "local"
    assert list(shown.values()).count("engine") == 6
    image = point_of(report, "L02-attn_out")["image"]
    assert image["shape"] == [6, 256]
    assert len(base64.b64decode(image["levels"])) == 6 * LARGEST
    assert not any(p["image"] for p in report_of("clean")["points"])
