"""report.html of every kind of report: whole, self-contained, safe, and small enough."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from report_cases import SHAPES, of_layers, point_of, report_of, with_later_rungs, with_odd_texts

from pytest_aprt import report as reports
from pytest_aprt.errors import SettingsError
from pytest_aprt.render import figures, files, html

_VOID = {"meta", "link", "input", "img", "br"}
_ATTRIBUTES_THAT_LOAD = {"src", "srcset", "data", "poster", "action"}
_NAMES_NOT_ADDRESSES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


class Reader(HTMLParser):
    """Reads a page and keeps what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.links, self.loads, self.tags = [], [], [], [], []
        self.cells, self.text = {}, []
        self.feed(text)
        self.close()
        assert self.stack == [], "tags left open"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        self.links += [found[k] for k in ("href", "xlink:href") if k in found]
        self.loads += [found[k] for k in _ATTRIBUTES_THAT_LOAD if k in found]
        if tag == "a" and "aria-label" in found:
            self.cells[found["href"].removeprefix("#p-")] = found
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack[-1:] not in (["script"], ["style"]):
            self.text.append(data)


def page_of(report):
    text = html.render(report)
    return text, Reader(text)


LIGHT = {name: shape for name, shape in SHAPES.items() if not re.match(r"80|200", name)}


@pytest.mark.parametrize("shape", LIGHT.values(), ids=LIGHT)
@pytest.mark.parametrize("name", ["overflow", "prompts"])
def test_every_page_is_whole_and_self_contained(name, shape):
    report = shape(report_of(name))
    text, page = page_of(report)
    text.encode()
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert all(source.startswith("data:") for source in page.loads)
    assert set(re.findall(r"https?://[^\"' <)]+", text)) <= _NAMES_NOT_ADDRESSES
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert set(page.cells) == {p["point"] for p in report["points"]}
    assert report["verdict"]["status"].replace("_", " ") in "".join(page.text)


def test_a_text_of_the_report_is_text_on_the_page():
    text, page = page_of(with_odd_texts(with_later_rungs(report_of("fault"))))
    tags = {tag for tag, _ in page.tags}
    assert "img" not in tags
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    assert "<img src=x onerror=alert(1)>" in "".join(page.text)
    assert "\\udcff" in text
    assert "\x00" not in text


def test_the_first_screen_names_layer_stage_size_and_meaning():
    report = report_of("fault")
    _, page = page_of(report)
    top = " ".join(" ".join(page.text).partition("Map of the model")[0].split())
    assert "A bug, first seen in layer 2 at k_post_rope" in top
    worst = report["verdict"]["origins"][0]["worst"]
    assert f"{worst['rel_l2']:.1%} at {worst['axis']} {worst['index']}" in top
    assert "times its tolerance" in top
    assert "Still sound before it L02-qkv_bias" in top
    assert "rotary embedding: base, pairing of channels" in top
    assert "All origins, in computation order: L02-k_post_rope L02-attn_out" in top


def test_a_quiet_run_says_what_was_found():
    _, page = page_of(report_of("clean"))
    top = " ".join(" ".join(page.text).partition("Map of the model")[0].split())
    assert "No bug found: the quantised weights explain the distance" in top
    assert re.search(r"Lowest cosine 0\.9\d+ total, at L\d\d-", top)
    assert "origins" not in "".join(page.text).partition("Map of the model")[0]


def test_a_broken_rung_is_the_headline_and_is_open():
    report = report_of("clean")
    report["ladder"]["config"][0].update(status="broken", model=1)
    report["verdict"].update(status="DIVERGED", rung="config", summary="DIVERGED: config x is 1")
    _, page = page_of(report)
    assert "The fault is in the config" in "".join(page.text)
    top = " ".join("".join(page.text).partition("Map of the model")[0].split())
    assert "Whereconfig n_layers" in top and "#rung-config" in page.links
    rungs = {a["id"]: a for tag, a in page.tags if tag == "details" and "rung" in a["class"]}
    assert [name for name, a in rungs.items() if "open" in a] == ["rung-config"]


def test_rungs_and_contracts_of_a_later_version_show():
    _, page = page_of(with_later_rungs(report_of("clean")))
    text = "".join(page.text)
    for name in ("Tokens", "Logits", "Decode", "Contracts", "FALSIFY-X-001", "DISCHARGED"):
        assert name in text


def test_cells_say_in_words_what_they_show_in_colour():
    report = report_of("fault")
    _, page = page_of(report)
    cell = page.cells["L02-attn_out"]
    assert re.fullmatch(
        r"L02-attn_out: diverged; local 1\.0e\+00, engine \S+, weights \S+, total \S+",
        cell["aria-label"],
    )
    assert cell["class"].split()[:2] == ["diverged", f"l{figures.LEVELS - 1}"]
    quiet = page.cells["L01-attn_out"]["class"].split()
    assert int(quiet[1][1:]) < figures.LEVELS / 2
    assert int(quiet[3][1:]) > int(quiet[2][1:])  # weights cost more than the engine adds


def test_what_cannot_be_compared_is_no_large_error():
    report = report_of("overflow")
    _, page = page_of(report)
    after = page.cells["L03-attn_out"]["class"].split()
    assert after == ["inherited", "lx", f"e{figures.LEVELS - 1}", *after[3:]]
    assert page.cells["L01-ffn_gate"]["class"].split()[1] == f"l{figures.LEVELS - 1}"


@pytest.mark.parametrize(
    ("size", "level"),
    [(0.0, 0), (1e-12, 0), (1e-8, 0), (1e-4, 16), (1.0, 31), (50.0, 31), ("inf", 31),
     ("nan", None)],
)  # fmt: skip
def test_levels_are_logarithmic(size, level):
    assert figures.level({"rel_l2": size, "non_finite": {"model": 0, "replay": 0}}) == level


def test_new_non_finite_values_have_the_last_level_and_shared_ones_their_size():
    assert figures.level({"rel_l2": 0.0, "non_finite": {"model": 1, "replay": 0}}) == 31
    assert figures.level({"rel_l2": 0.0, "non_finite": {"model": 1, "replay": 1}}) == 0
    assert figures.level(None) is None


def test_the_ramp_goes_one_way_in_lightness():
    """What tells sizes apart is lightness, which every eye sees."""
    for dark, order in ((False, -1), (True, 1)):
        lightness = [
            sum(w * int(c[i : i + 2], 16) for w, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5)))
            for c in figures.ramp(dark)
        ]
        assert lightness == sorted(lightness, reverse=order < 0)
        assert abs(lightness[0] - lightness[-1]) > 150


@pytest.mark.parametrize("name", ["fault", "prompts"])
def test_a_28_layer_page_is_below_2_mb(name):
    report = of_layers(report_of(name), 28)
    assert 500_000 < len(html.render(report).encode()) < 2_000_000


def test_the_page_is_the_same_every_time():
    assert html.render(report_of("fault")) == html.render(report_of("fault"))


def test_every_failing_point_has_the_command_to_run_it_again():
    text, _ = page_of(report_of("fault"))
    for point in report_of("fault")["points"]:
        command = f"{report_of('fault')['run']['command']} -k {point['point']}<"
        assert (command in text) == (point["status"] in ("diverged", "inherited"))


def test_an_older_report_without_images_can_be_drawn():
    report = report_of("fault")
    for point in report["points"]:
        del point["image"]
    assert "Where the local difference lies" not in html.render(report)
    assert html.render(report_of("fault")).count("Where the local difference lies") == 2


def test_all_three_files_and_the_page_again_from_the_json_alone(tmp_path):
    files.write(report_of("fault"), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.json", "report.md", "report.html",
    }  # fmt: skip
    files.redraw(tmp_path / "out" / "report.json", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == (tmp_path / "out/report.html").read_text()
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SettingsError, match="is no aprt-report-v1 report"):
        files.redraw(tmp_path / "other.json", tmp_path / "never.html")
    assert not (tmp_path / "never.html").exists()


def test_a_point_keeps_its_numbers_through_the_file(tmp_path):
    reports.write(report_of("prompts"), tmp_path / "r.json")
    report = reports.read(tmp_path / "r.json")
    assert point_of(report, "L02-attn_out") == point_of(report_of("prompts"), "L02-attn_out")


def section_of(page, title):
    """The text behind a heading."""
    return " ".join("".join(page.text).split(title, 1)[1].split())


def test_the_most_likely_tokens_stand_side_by_side_as_text():
    report = report_of("prompts")
    top = report["ladder"]["logits"][0]["top"]
    assert [len(top[side]) for side in ("model", "shadow", "oracle")] == [5, 5, 5]
    shown = section_of(page_of(report)[1], "most likely next tokens")
    for side in ("model", "shadow", "oracle"):
        assert f"{top[side][0]['token']!r} {top[side][0]['p']:.1%}" in shown
    for row in report["ladder"]["logits"]:
        row.pop("top", None)  # as in a report of before
    assert "most likely next tokens" not in page_of(report)[0]


def test_decode_growth_is_drawn_over_the_steps():
    report = report_of("clean")
    text, page = page_of(report)
    drawn = re.findall(r'<svg [^>]*aria-label="Relative L2 of the logits over the decode', text)
    assert len(drawn) == 2  # for wide and narrow pages
    told = {row["name"]: row for row in report["ladder"]["decode"]}
    shown = section_of(page, "furthest from its own prefill")
    assert repr(told["text"]["oracle_text"])[1:4] in shown
    assert f"{told['step3']['engine_rel_l2']:.1e}" in shown
    assert "decode the engine has no" not in shown
    report["ladder"]["decode"] = [{"name": "step1", "status": "unavailable", "reason": "none"}]
    text, page = page_of(report)
    assert "over the decode" not in text
    assert section_of(page, "Decode").startswith("not judged")


@pytest.mark.parametrize(("outcome", "declared", "supported", "said"), [
    ("failed", "PROPOSED", "FALSIFIED", "1 to look at"),
    ("passed", "DISCHARGED", "PARTIAL_ALGORITHM_LEVEL", "overstated"),
    ("error", None, "PROPOSED", "1 to look at"),
    ("blocked", "FUNCTIONAL", "FUNCTIONAL", "nothing falsified or overstated"),
    ("passed", "PARTIAL", "PARTIAL_ALGORITHM_LEVEL", "1 of 1 held; tally 0+1"),
])  # fmt: skip
def test_contracts_have_a_section_that_tells_what_to_look_at(outcome, declared, supported, said):
    report = with_later_rungs(report_of("clean"))
    report["contracts"][0].update(outcome=outcome, declared=declared, supported=supported)
    _, page = page_of(report)
    assert said in section_of(page, "Contracts and ledger")
    opened = next(a for tag, a in page.tags if a.get("id") == "rung-contracts")
    bad = said in ("1 to look at", "overstated")
    assert ("open" in opened) is bad
    top = " ".join("".join(page.text).partition("Map of the model")[0].split())
    assert ("1 claim of the contracts falsified or overstated: FALSIFY-X-001" in top) is bad


def test_every_prompt_has_its_errors():
    report = report_of("prompts")
    shown = section_of(page_of(report)[1], "Prompts")
    for number in range(5):
        assert f"prompt {number}" in shown
    point = point_of(report, "L02-k_post_rope")
    text = section_of(page_of(report)[1], "on every prompt")
    for errors in point["prompts"]:
        assert f"{errors['total']['cosine']:.6f}" in text[:2000]
    assert "on every prompt" not in page_of(report_of("fault"))[0]
