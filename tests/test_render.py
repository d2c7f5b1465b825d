"""Every rendering of a report: of real runs, and of reports made up for what runs rarely show."""

from __future__ import annotations

import copy
import json
import re
import typing

import pytest
from harness import FIXTURES, faulty

from pytest_aprt import outcomes
from pytest_aprt import report as reports
from pytest_aprt.errors import SettingsError
from pytest_aprt.pair import open_headers, open_pair
from pytest_aprt.render import failure, markdown, terminal
from pytest_aprt.render.words import SYMBOLS
from pytest_aprt.run import run
from pytest_aprt.settings import read_settings
from pytest_aprt.stages import point_id
from pytest_aprt.verdict import STATUSES

MODEL, ORACLE = FIXTURES / "tiny-qwen2" / "q4_k_m.gguf", FIXTURES / "tiny-qwen2" / "hf"
COMMAND = "pytest --aprt-model=q4_k_m.gguf --aprt-oracle=hf"


class Fault:
    """Doubles the output projection of layer 2 and swaps the halves of one head's K."""

    layer = 2
    changes: typing.ClassVar = {
        "k_post_rope": lambda value, work: value[:, ::-1],
        "attn_out": lambda value, work: value * 2,
    }


def run_of(fault=None, **options):
    given = {"model": str(MODEL), "oracle": str(ORACLE), "tokens": ["3,77,500,12,640,9"], **options}
    settings = read_settings({f"aprt_{k}": v for k, v in given.items()}.get, command=COMMAND)
    headers = open_headers(settings.weights, settings.oracle)
    engine = None if fault is None else faulty(open_pair(headers), fault)
    return run(headers, settings, engine, lambda what, done, total: None)


@pytest.fixture(scope="module")
def clean_run():
    return run_of()


@pytest.fixture(scope="module")
def faulty_run():
    return run_of(Fault)


@pytest.fixture
def clean(clean_run):
    return copy.deepcopy(clean_run)


@pytest.fixture
def fault(faulty_run):
    return copy.deepcopy(faulty_run)


def point_of(report, name):
    return next(p for p in report["points"] if p["point"] == name)


def of_layers(report, count):
    """The same report of a deeper model: layer 3 repeated."""
    last = [p for p in report["points"] if p["layer"] == 3]
    head = [p for p in report["points"] if p["layer"] is None]
    points = [p for p in report["points"] if p["layer"] is not None]
    for layer in range(4, count):
        points += [{**p, "layer": layer, "point": point_id(layer, p["stage"])} for p in last]
    return {**report, "points": points + head}


def with_note(report):
    note = (
        "every prompt is a single token: position 0 is blind to RoPE, masks and most attention "
        "faults; use a longer prompt"
    )
    return {**report, "notes": [note]}


def with_many_origins(report):
    origin = report["verdict"]["origins"][0]
    origin["bracket"] = ["L02-k_post_rope", "L02-post_attn_residual", origin["point"]]
    report["verdict"]["origins"] = [origin] * 40
    return report


def with_failed_self_tests(report):
    for test in report["self_test"]:
        test.update(passed=False, detail="something went wrong " * 20)
    report["verdict"].update(
        status="INCONCLUSIVE", summary="INCONCLUSIVE: the self-test failed: " + "wrong " * 200
    )
    return report


def with_broken_rungs(report):
    report["ladder"]["config"][7].update(status="broken", model={"kind": "yarn", "factor": "inf"})
    report["ladder"]["weights"][3].update(status="broken", reason="missing in the GGUF")
    return report


SHAPES = {
    "as-it-is": lambda r: r,
    "note": with_note,
    "28-layers": lambda r: of_layers(r, 28),
    "80-layers": lambda r: of_layers(r, 80),
    "126-layers": lambda r: of_layers(r, 126),
    "failed-self-tests": with_failed_self_tests,
    "broken-rungs": with_broken_rungs,
    "one-point": lambda r: {**r, "points": r["points"][:1]},
    "no-points": lambda r: {**r, "points": []},
}


# What the runs found


def test_the_clean_run_is_noise(clean):
    assert clean["verdict"]["status"] == "QUANTISATION_NOISE"
    assert {p["status"] for p in clean["points"]} == {"noise", "pass"}
    assert all(t["passed"] for t in clean["self_test"])


def test_the_faulty_run_names_both_faults(fault):
    assert fault["verdict"]["status"] == "DIVERGED"
    assert fault["verdict"]["first_divergence"] == {
        "layer": 2, "stage": "k_post_rope", "point": "L02-k_post_rope",
        "previous_good": "L02-qkv_bias",
    }  # fmt: skip
    origins = [o["point"] for o in fault["verdict"]["origins"]]
    assert origins == ["L02-k_post_rope", "L02-attn_out"]


# The terminal


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["clean", "fault"])
def test_the_summary_is_small_and_plain(request, kind, shape):
    lines = terminal.render(shape(request.getfixturevalue(kind)), "out")
    assert len(lines) <= 25
    assert [line for line in lines if len(line) > 80] == []
    assert all(line.isascii() and "\n" not in line for line in lines)


def test_many_origins_stay_small(fault):
    lines = terminal.render(with_many_origins(fault), None)
    assert len(lines) <= 25
    assert all(len(line) <= 80 for line in lines)
    assert any("L02-k_post_rope .. " in line for line in lines)


@pytest.mark.parametrize("kind", ["clean", "fault"])
@pytest.mark.parametrize(("saved", "said"), [("out", "report: out"), (None, "--aprt-report DIR")])
def test_the_last_line_says_where_the_report_is(request, kind, saved, said):
    assert said in terminal.render(request.getfixturevalue(kind), saved)[-1]


def test_the_summary_begins_with_the_verdict(clean, fault):
    assert terminal.render(clean, None)[0].startswith("QUANTISATION_NOISE: no stage adds error of ")
    assert terminal.render(fault, None)[0].startswith("DIVERGED: first at L02-k_post_rope (rel_l2 ")


def test_the_summary_counts_and_tabulates_layers(clean):
    text = "\n".join(terminal.render(clean, None))
    assert re.search(r"^71 points: \d+ noise, \d+ pass$", text, re.MULTILINE)
    for name in ("L00", "L01", "L02", "L03", "head"):
        assert re.search(rf"^{name} +\w+ +noise ", text, re.MULTILINE)


def test_origins_are_listed_with_a_hint_for_the_first(fault):
    text = "\n".join(terminal.render(fault, None))
    assert "origin L02-k_post_rope: local rel_l2 " in text
    assert "origin L02-attn_out: local rel_l2 1.0e+00" in text
    assert "  rotary embedding: base" in text


@pytest.mark.parametrize("layers", [7, 28, 80])
def test_many_layers_get_one_sign_each(fault, layers):
    lines = terminal.render(of_layers(fault, layers), None)
    text = "".join(lines)
    after = layers - 3
    assert "nnX" + ">" * after in text.replace("\n", "")
    assert "X diverged, > inherited, n noise" in text
    assert "worst point: L02-" in text


def test_every_status_has_a_sign_of_its_own():
    assert set(SYMBOLS) == set(STATUSES)
    assert len(set(SYMBOLS.values())) == len(SYMBOLS)


# A failure


def first_line(report, name):
    return failure.render(report, point_of(report, name)).splitlines()[0]


def test_the_first_line_of_an_origin_stands_alone(fault):
    line = first_line(fault, "L02-k_post_rope")
    assert re.fullmatch(
        r"L02-k_post_rope: local rel_l2 \d\.\de[+-]\d\d > \d\.\de-\d\d at \w+ \d+ "
        r"\(first divergence; L02-\w+ was \d\.\de-\d\d\)",
        line,
    )


def test_headline_and_verdict_name_the_same_good_point(fault):
    good = fault["verdict"]["first_divergence"]["previous_good"]
    assert f"; {good} was " in fault["verdict"]["summary"]
    assert f"; {good} was " in first_line(fault, "L02-k_post_rope")


def test_a_further_origin_names_the_first(fault):
    line = first_line(fault, "L02-attn_out")
    assert line.startswith("L02-attn_out: local rel_l2 1.0e+00 > 1.0e-05")
    assert "(a further origin; the first is L02-k_post_rope; " in line


def test_what_is_inherited_says_from_where(fault):
    line = first_line(fault, "L02-post_attn_residual")
    assert re.fullmatch(
        r"L02-post_attn_residual: total cosine 0\.\d+ < 0\.999 \(default\); "
        r"follows from L02-k_post_rope",
        line,
    )


def test_an_inherited_point_near_the_oracle_is_not_said_to_be_below(fault):
    point = point_of(fault, "L02-post_attn_residual")
    point["total"]["cosine"] = 0.9995
    assert "< 0.999" not in failure.headline(fault, point)


def test_a_failure_shows_the_neighbourhood_the_elements_and_how_to_run_again(fault):
    text = failure.render(fault, point_of(fault, "L02-attn_out"))
    assert "\n> L02-attn_out " in text
    assert re.search(r"^worst elements +model +replay +difference$", text, re.MULTILINE)
    assert len(re.findall(r"^token \d+, channel \d+ ", text, re.MULTILINE)) == 5
    assert "slope 2, norm ratio 2" in text
    assert "likely: the direction is right and the length is not" in text
    assert "shape (6, 256), prompt 'token ids' (6 tokens)" in text
    assert text.endswith(f"again: {COMMAND} -k L02-attn_out")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_non_finite_numbers_can_be_rendered(fault, number):
    for name in ("L02-k_post_rope", "L02-post_attn_residual", "L03-ffn_out"):
        point = point_of(fault, name)
        for error in ("total", "engine", "local"):
            for key in ("cosine", "rel_l2", "slope", "norm_ratio", "max_abs", "rms", "sqnr_db"):
                point[error][key] = number
        point["worst_slice"]["rel_l2"] = point["tolerance"]["rel_l2"] = number
        for diff in point["top_diffs"]:
            diff["model"] = number
        assert failure.render(fault, point).startswith(f"{name}: ")
    assert len(terminal.render(fault, None)) <= 25
    assert "## Layers" in markdown.render(fault)


def test_new_non_finite_values_are_counted_in_the_first_line(fault):
    point = point_of(fault, "L02-k_post_rope")
    point["local"]["non_finite"]["model"] = 3
    line = failure.headline(fault, point)
    assert line.startswith("L02-k_post_rope: 3 non-finite values although all inputs are finite (")


def test_a_bracket_says_what_to_capture(fault):
    with_many_origins(fault)
    text = failure.render(fault, point_of(fault, "L02-k_post_rope"))
    assert "capture L02-k_post_rope, L02-post_attn_residual to narrow it" in text


# Markdown


def tables(text):
    found, lines = [], [*text.splitlines(), ""]
    start = None
    for number, line in enumerate(lines):
        if line.startswith("|") and start is None:
            start = number
        if not line.startswith("|") and start is not None:
            found.append(lines[start:number])
            start = None
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["clean", "fault"])
def test_markdown_has_its_sections_and_valid_tables(request, kind, shape):
    report = shape(request.getfixturevalue(kind))
    text = markdown.render(report)
    for heading in ("# Forward-pass parity", "## Self-test", "## Layers", "## Run"):
        assert f"\n{heading}\n" in "\n" + text
    assert ("\n## Origins\n" in text) == (kind == "fault")
    assert f"**{report['verdict']['status']}** " in text
    assert f"All {len(report['points'])} points" in text
    found = tables(text)
    assert len(found) >= 4
    for rows in found:
        assert len({line.count("|") for line in rows}) == 1
        assert re.fullmatch(r"\|[-:|]+\|", rows[1])


def test_markdown_lists_broken_rungs(clean):
    text = markdown.render(with_broken_rungs(clean))
    assert "\n## Config\n" in text
    assert "\n## Weights\n" in text
    assert "missing in the GGUF" in text


def test_a_pipe_in_a_path_breaks_no_table(clean):
    clean["model"]["source"] = "a|b.gguf"
    for rows in tables(markdown.render(clean)):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1


def test_every_point_is_in_the_markdown(clean):
    text = markdown.render(clean)
    assert all(f"| {p['point']} " in text for p in clean["points"])


# report.json


def strict(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("kind", ["clean", "fault"])
def test_the_report_is_strict_json_and_round_trips(request, tmp_path, kind):
    report = request.getfixturevalue(kind)
    path = tmp_path / "new" / "report.json"
    reports.write(report, path)
    assert strict(path.read_text()) == report
    assert reports.read(path) == report
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_a_point_with_nan_is_strict_json_too(tmp_path):
    class Overflow:
        layer = 1
        changes: typing.ClassVar = {"ffn_gate": lambda value, work: value * float("nan")}

    report = run_of(Overflow)
    reports.write(report, tmp_path / "r.json")
    assert '"nan"' in (tmp_path / "r.json").read_text()
    verdict = strict((tmp_path / "r.json").read_text())["verdict"]
    assert verdict["summary"].startswith("DIVERGED: first at L01-ffn_gate (")
    line = first_line(report, "L01-ffn_gate")
    assert "non-finite values although all inputs are finite (first divergence" in line


def test_a_report_of_another_schema_is_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"schema": "other-v1"}')
    with pytest.raises(SettingsError, match="is no aprt-report-v1 report: its schema is 'other-v1"):
        reports.read(tmp_path / "r.json")


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot write .*; choose another folder with --aprt"):
        reports.write_text(tmp_path / "file" / "report.md", "x")


def test_a_text_that_cannot_be_encoded_leaves_nothing_behind(tmp_path):
    """A path that is no UTF-8 reaches the report as surrogates."""
    reports.write_text(tmp_path / "report.md", "model \udcff.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


def keys_differ(value, kind, path="report"):
    """Return where the keys of a report are not those of its TypedDict."""
    if typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind)
        wrong = [f"{path}: {sorted(set(hints) ^ set(value))}"] if set(hints) != set(value) else []
        return wrong + [
            w
            for k, h in hints.items()
            if k in value
            for w in keys_differ(value[k], h, f"{path}.{k}")
        ]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return [w for i, v in enumerate(value) for w in keys_differ(v, inner[0], f"{path}[{i}]")]
    if type(None) in inner and value is not None:
        return keys_differ(value, next(k for k in inner if k is not type(None)), path)
    return []


@pytest.mark.parametrize("kind", ["clean", "fault"])
def test_the_report_has_exactly_the_keys_of_its_schema(request, kind):
    report = request.getfixturevalue(kind)
    assert report["schema"] == reports.SCHEMA == "aprt-report-v1"
    assert keys_differ(report, reports.Report) == []


def test_the_schema_check_finds_a_key_too_many_and_one_too_few(clean):
    clean["points"][0]["total"]["cosin"] = clean["points"][0]["total"].pop("cosine")
    assert keys_differ(clean, reports.Report) == ["report.points[0].total: ['cosin', 'cosine']"]


# Outcomes of the tests


def test_every_test_has_an_outcome(fault):
    headers = open_headers(str(MODEL), str(ORACLE))
    names = outcomes.test_names(headers, headers.graph.points)
    assert len(names) == len(set(names)) == 144
    found = {name: outcomes.outcome_of(fault, name) for name in names}
    failed = [name for name, outcome in found.items() if outcome.outcome == "failed"]
    assert failed == ["L02-k_post_rope", "L02-attn_out", "gate"]
    for name in failed:
        assert found[name].text
    assert found["gate"].text == fault["verdict"]["summary"]


def test_an_outcome_carries_its_numbers(fault):
    properties = outcomes.outcome_of(fault, "L02-attn_out").properties
    assert properties["status"] == "diverged"
    assert properties["local_rel_l2"] == pytest.approx(1.0, rel=1e-4)
    assert set(properties) == {"status"} | {
        f"{error}_{metric}"
        for error in ("total", "weights", "engine", "local")
        for metric in ("cosine", "rel_l2")
    }
    assert outcomes.outcome_of(fault, "config-rope_theta").properties == {
        "model": "1000000.0", "oracle": "1000000.0",
    }  # fmt: skip
    assert outcomes.outcome_of(fault, "weights-blk.0.attn_q.weight").properties["type"] == "Q4_K"
