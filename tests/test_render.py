"""The terminal's summary, a failure's text and report.md, of every kind of report."""

from __future__ import annotations

import re

import pytest
from report_cases import (
    COMMAND,
    SHAPES,
    of_layers,
    point_of,
    report_of,
    with_broken_rungs,
    with_later_rungs,
    with_many_origins,
    with_odd_texts,
)

from pytest_aprt.render import failure, markdown, terminal, words
from pytest_aprt.render.ladder import BAD, GOOD, NEUTRAL, mark, rung, rungs
from pytest_aprt.statuses import STATUSES

RUNS = ("clean", "fault", "overflow", "prompts")
every_report = pytest.mark.parametrize("name", RUNS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def summary(report, saved=None, verbosity=0):
    return [line.text for line in terminal.render(report, saved, verbosity)]


# The terminal


@every_shape
@every_report
@pytest.mark.parametrize("saved", [None, "/a/long/path" * 12])
def test_the_summary_is_small_and_plain(name, shape, saved):
    lines = summary(shape(report_of(name)), saved)
    assert len(lines) <= 25
    assert [line for line in lines if len(line) > 80] == []
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert any(line.startswith("report: ") for line in lines[-3:])


@every_report
@pytest.mark.parametrize("verbosity", [0, 1])
def test_the_summary_fits_a_narrow_terminal(name, verbosity):
    lines = [text for text, _ in terminal.render(report_of(name), None, verbosity, width=60)]
    assert [line for line in lines if len(line) > 60] == []
    assert [line for line in lines if re.search(r"e[-+]\d\d\d", line)] == []  # columns run together


@every_shape
@every_report
def test_quiet_is_one_line_and_verbose_has_every_point(name, shape):
    report = shape(report_of(name))
    (quiet,) = summary(report, verbosity=-1)
    assert quiet.startswith(report["verdict"]["status"])
    verbose = summary(report, verbosity=1)
    assert [line for line in verbose if len(line) > 80] == []
    first_words = [line.split(" ")[0] for line in verbose]
    assert all(p["point"] in first_words for p in report["points"])


@pytest.mark.parametrize(("saved", "said"), [("out", "report: out"), (None, "--aprt-report DIR")])
@pytest.mark.parametrize("name", ["clean", "fault"])
def test_the_last_line_says_where_the_report_is(name, saved, said):
    assert said in summary(report_of(name), saved)[-1]


def test_the_summary_begins_with_the_verdict():
    assert summary(report_of("clean"))[0].startswith("QUANTISATION_NOISE: no stage adds error of ")
    assert summary(report_of("fault"))[0].startswith("DIVERGED: first at L02-k_post_rope (rel_l2 ")


def test_the_verdict_is_green_where_the_gate_passes_and_red_where_not():
    for name, colour in (("clean", "green"), ("fault", "red")):
        assert terminal.render(report_of(name), None)[0].markup == {"bold": True, colour: True}


def test_the_summary_counts_and_tabulates_layers():
    text = "\n".join(summary(report_of("clean")))
    assert re.search(r"^71 points: \d+ noise, \d+ pass$", text, re.MULTILINE)
    for name in ("L00-", "L01-", "L02-", "L03-", "final_norm"):
        assert re.search(rf"^{name}\w* +noise +0\.\d+ ", text, re.MULTILINE)


def test_an_origin_has_the_number_that_belongs_to_its_place():
    report = report_of("fault")
    worst = report["verdict"]["origins"][0]["worst"]
    whole = report["verdict"]["origins"][0]["local"]["rel_l2"]
    assert worst["axis"] != "all"
    assert abs(worst["rel_l2"] / whole - 1) > 0.05  # else this could not fail
    line = f"origin L02-k_post_rope: local rel_l2 {worst['rel_l2']:.1e} at {worst['axis']} "
    assert any(text.startswith(line) for text in summary(report))
    assert f"| {worst['rel_l2']:.1e} at {worst['axis']} " in markdown.render(report)


def test_the_first_origin_has_its_hint():
    assert any(line.startswith("  rotary embedding: base") for line in summary(report_of("fault")))


def test_further_origins_are_counted():
    report = with_many_origins(report_of("fault"))
    lines = summary(report)
    assert any("origin L02-attn_norm .. L02-qkv_bias: " in line for line in lines)
    assert f"and {len(report['verdict']['origins']) - 3} further origins" in lines


@pytest.mark.parametrize("layers", [7, 28, 80, 200])
def test_many_layers_get_one_sign_each(layers):
    text = "".join(summary(of_layers(report_of("fault"), layers)))
    signs = re.search(r"worst status of each layer: (.*?)  \(", text)[1].replace(" ", "")
    assert signs == "nnX" + ">" * (layers - 3) + ">"
    assert "X diverged, > inherited, n noise; last sign: the head" in text
    assert "worst point: L02-" in text


# A failure


def first_line(report, name):
    return failure.render(report, point_of(report, name)).splitlines()[0]


def test_the_first_line_of_an_origin_stands_alone():
    assert re.fullmatch(
        r"L02-k_post_rope: local rel_l2 \d\.\de[+-]\d\d > \d\.\de-\d\d at \w+ \d+ "
        r"\(first divergence; L02-qkv_bias was \d\.\de-\d\d\)",
        first_line(report_of("fault"), "L02-k_post_rope"),
    )


@pytest.mark.parametrize("name", ["fault", "prompts"])
def test_headline_and_verdict_name_the_same_good_point(name):
    report = report_of(name)
    good = report["verdict"]["first_divergence"]["previous_good"]
    assert f"; {good} was " in report["verdict"]["summary"]
    assert f"; {good} was " in first_line(report, "L02-k_post_rope")


def test_a_further_origin_names_the_first():
    line = first_line(report_of("fault"), "L02-attn_out")
    assert line.startswith("L02-attn_out: local rel_l2 1.0e+00 > 1.0e-05")
    assert "(a further origin; the first is L02-k_post_rope; L02-attention was " in line


def test_what_is_inherited_says_from_where_and_what_was_judged():
    assert re.fullmatch(
        r"L02-attn_scores: engine cosine -?0\.\d+ < 0\.999 \(default\); "
        r"follows from L02-k_post_rope",
        first_line(report_of("fault"), "L02-attn_scores"),
    )


def test_an_inherited_point_is_not_said_to_be_below_where_it_is_not():
    report = report_of("fault")
    point = point_of(report, "L02-post_attn_residual")
    point["engine"]["cosine"] = 0.9995
    assert failure.headline(report, point).startswith("L02-post_attn_residual: total cosine 0.")
    point["total"]["cosine"] = 0.9995
    assert failure.headline(report, point) == (
        "L02-post_attn_residual: follows from L02-k_post_rope"
    )


def test_a_strict_failure_tells_total():
    report = report_of("clean")
    point = point_of(report, "L01-ffn_out")
    point.update(outcome="failed", reason="--aprt-strict")
    assert failure.headline(report, point).startswith("L01-ffn_out: total cosine 0.9")


def test_a_failure_shows_the_neighbourhood_the_elements_and_how_to_run_again():
    report = report_of("fault")
    text = failure.render(report, point_of(report, "L02-attn_out"))
    assert "\n> L02-attn_out " in text
    assert re.search(r"^worst elements +model +replay +difference$", text, re.MULTILINE)
    assert len(re.findall(r"^token \d+, channel \d+ ", text, re.MULTILINE)) == 5
    assert "slope 2, norm ratio 2" in text
    assert "likely: the direction is right and the length is not" in text
    assert "shape (6, 256), prompt 'token ids' (6 tokens)" in text
    assert text.endswith(f"again: {COMMAND} -k L02-attn_out")


def test_the_prompt_shown_is_the_one_where_the_point_is_worst():
    report = report_of("prompts")
    point = point_of(report, "L02-k_post_rope")
    text = failure.render(report, point)
    assert f"({len(report['run']['prompts'][point['prompt']]['tokens'])} tokens)" in text


@every_shape
@pytest.mark.parametrize("name", ["fault", "overflow", "prompts"])
def test_every_failing_point_of_every_report_can_be_told(name, shape):
    report = shape(report_of(name))
    failing = [p for p in report["points"] if p["status"] in ("diverged", "inherited")]
    for point in [*failing[:12], *failing[-1:]]:
        text = failure.render(report, point)
        assert text.startswith(f"{point['point']}: ")
        text.encode()


def test_values_that_turn_non_finite_are_counted_in_the_first_line():
    report = report_of("overflow")
    channels = point_of(report, "L01-ffn_gate")["shape"][1]
    assert first_line(report, "L01-ffn_gate").startswith(
        f"L01-ffn_gate: {channels} non-finite values although all inputs are finite (first div"
    )
    assert first_line(report, "L01-ffn_out").startswith("L01-ffn_out: local rel_l2 1.0e+00 > ")
    assert first_line(report, "L01-ffn_silu") == (
        f"L01-ffn_silu: {channels} non-finite values; follows from L01-ffn_gate"
    )


def test_a_bracket_says_what_to_capture():
    report = with_many_origins(report_of("fault"))
    text = failure.render(report, point_of(report, "L02-attn_out"))
    assert "the fault lies in L02-attn_norm .. L02-attn_out; " in text
    assert "capture L02-attn_norm, L02-qkv_matmul to narrow it" in text


# Markdown


def tables(text):
    """All tables: lists of lines; a table ends at the first line that is none."""
    return re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)


@every_shape
@every_report
def test_markdown_has_its_sections_and_valid_tables_and_fits_a_comment(name, shape):
    report = shape(report_of(name))
    text = markdown.render(report)
    assert len(text) <= 60_000
    text.encode()
    for heading in ("# Forward-pass parity", "## Layers", "## Run"):
        assert f"\n{heading}\n" in "\n" + text
    assert ("\n## Origins\n" in text) == bool(report["verdict"]["origins"])
    assert text.startswith(f"# Forward-pass parity\n\n**{report['verdict']['status']}** ")
    assert len(tables(text)) >= (3 if report["points"] else 1)
    for table in tables(text):
        rows = table.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1
        assert re.fullmatch(r"\|[-:|]+\|", rows[1])
    body = text.partition("## Run")[0]
    tags = set(re.findall(r"<[^>]*>", re.sub(r"(`+)[^`].*?[^`]\1(?!`)", "", body)))
    assert tags <= {"<details>", "</details>", "<summary>", "</summary>"}


def test_markdown_lists_broken_rungs_and_only_them():
    report = with_later_rungs(with_broken_rungs(report_of("clean")))
    text = markdown.render(report)
    assert "\n## Config\n" in text
    assert "\n## Decode\n" in text
    assert "\n## Tokens\n" not in text
    weights = text.partition("\n## Weights\n")[2].partition("\n## ")[0]
    assert "missing in the GGUF" in weights
    assert len(tables(weights)[0].splitlines()) == 3


def test_a_failed_self_test_is_told_and_passed_ones_are_counted():
    report = report_of("clean")
    count = len(report["self_test"])
    assert f"\nSelf-test of the capture: {count} of {count} passed.\n" in markdown.render(report)
    report["self_test"][1].update(passed=False, detail="a|b\nc")
    text = markdown.render(report)
    assert f"\n## Self-test: 1 of {count} failed\n" in text
    assert "a\\|b c" in text


def test_every_point_is_in_the_markdown_of_a_small_model_the_worst_first():
    text = markdown.render(report_of("fault"))
    rows = tables(text.partition("All 71 points")[2])[0].splitlines()[2:]
    names = [row.split()[1] for row in rows]
    points = report_of("fault")["points"]
    assert sorted(names) == sorted(p["point"] for p in points)
    assert {names[0], names[1]} == {"L02-k_post_rope", "L02-attn_out"}


def test_the_command_keeps_its_lines_and_a_mention_mentions_nobody():
    text = markdown.render(with_odd_texts(report_of("fault")))
    assert "$ pytest '--aprt-prompt=a|b\n> `c` <img" in text
    assert "\\@someone" in text.partition("## Run")[0]


# Rungs


def test_rungs_of_any_form_become_tables():
    report = with_later_rungs(with_broken_rungs(report_of("clean")))
    found = {r.name: r for r in rungs(report["ladder"])}
    assert list(found) == ["tokens", "config", "weights", "logits", "decode"]
    assert found["config"].bad == 1
    assert found["config"].rows[0].mark == BAD
    assert found["config"].columns[:3] == ("name", "model", "oracle")
    assert found["logits"].columns == ("argmax", "kl", "top")
    assert all(len(row.cells) == len(r.columns) for r in found.values() for row in r.rows)
    assert rung("top", {"rows": [{"a": 1}, {"b": 2}]}).columns == ("a", "b")
    assert rung("n", 3).rows[0].cells == (3,)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"status": "broken"}, BAD),
        ({"passed": False}, BAD),
        ({"passed": True}, GOOD),
        ({"outcome": "failed", "supported": "FUNCTIONAL"}, BAD),
        ({"status": "FALSIFIED"}, BAD),
        ({"status": "differs"}, NEUTRAL),
        ({"status": "agree"}, GOOD),
        ({"kl": 0.1}, NEUTRAL),
    ],
)
def test_a_row_is_marked_by_what_it_says(row, expected):
    assert mark(row) == expected


# Words


def test_every_status_has_a_sign_and_a_colour_of_its_own():
    assert set(words.SYMBOLS) == set(STATUSES)
    assert len(set(words.SYMBOLS.values())) == len(words.SYMBOLS)
    assert set(terminal._COLOURS) == set(STATUSES)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.9, "0.900000"), (1.0, "1.000000"), (1 - 1e-9, "1.000000"), (0.9999991, "0.999999"),
     ("nan", "nan"), (-0.5, "-0.500000")],
)  # fmt: skip
def test_a_cosine_in_words(value, text):
    assert words.cosine({"cosine": value}) == text


@pytest.mark.parametrize(
    ("worst", "text"),
    [
        (None, ""),
        ({"axis": "all", "index": None, "rel_l2": 1.0}, ""),
        ({"axis": "head", "index": 3, "rel_l2": 1.0}, " at head 3"),
        ({"axis": "part", "index": 2, "rel_l2": 1.0}, " in V"),
    ],
)
def test_a_slice_in_words(worst, text):
    assert words.where(worst) == text


@pytest.mark.parametrize(
    ("error", "bound", "expected"),
    [(1.0, 0.5, 2.0), ("nan", 0.5, float("inf")), (1.0, 0.0, float("inf")), (0.0, 0.0, 0.0),
     (1.0, "nan", float("inf"))],
)  # fmt: skip
def test_excess_of_odd_numbers(error, bound, expected):
    point = point_of(report_of("clean"), "L01-ffn_out")
    point["worst_slice"]["rel_l2"], point["tolerance"]["rel_l2"] = error, bound
    assert words.excess(point) == expected


def test_the_worst_point_is_the_one_with_the_worst_status():
    report = report_of("fault")
    assert words.worst_of(report["points"])["point"] in ("L02-k_post_rope", "L02-attn_out")
    clean = report_of("clean")
    point_of(clean, "L01-attn_norm")["status"] = "drift"
    assert words.worst_of(clean["points"])["point"] == "L01-attn_norm"
