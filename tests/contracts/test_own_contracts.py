"""Every falsifier of this project's contracts holds, and fails by a planted fault of its own."""

from __future__ import annotations

import numpy as np
import pytest
from contract_bench import CONTRACTS, IDS, bench_of, healthy, judge, numpy_engine
from faults.decoding import CACHE_FAULTS, Decoder
from harness import fixture_pair

from pytest_aprt.commands import trace
from pytest_aprt.contracts.checks import diffs, dumps, own, transitions
from pytest_aprt.contracts.contract import parse
from pytest_aprt.contracts.subject import Bench
from pytest_aprt.sources import aprt
from pytest_aprt.sources.aprt_writer import DumpWriter


@pytest.mark.parametrize("falsifier_id", IDS)
def test_it_holds_on_a_healthy_engine(falsifier_id, tmp_path):
    found = judge(falsifier_id, tmp_path, healthy())
    assert (found.outcome, found.by) == ("passed", "check"), found.detail
    assert found.detail and found.check_hash


def scaled(factor):
    return lambda value, workings: value * np.float32(factor)


def rolled(value, workings):
    return np.roll(value, 1, axis=-1)


class Changing:
    """An engine that computes something else in every run."""

    def __init__(self):
        self.inner, self.runs = numpy_engine({}), 0

    def layers(self, tokens):
        self.runs += 1
        for layer, stages in self.inner.layers(tokens):
            if "lm_head" in stages:
                stages["lm_head"][0] += self.runs
            yield layer, stages


class Hiding:
    """An engine that does not show a stage."""

    def layers(self, tokens):
        for layer, stages in numpy_engine({}).layers(tokens):
            yield layer, {n: v for n, v in stages.items() if (layer, n) != (2, "attn_softmax")}


def wrong_beyond_the_prompt(value, workings):
    return np.roll(value, 1, axis=-1) if len(value) > 6 else value


def other_head(value, workings):
    return np.roll(value, 7)


ENGINES = {
    # falsifier: an engine on which it must fail
    "FALSIFY-APR-TRACE-SAVE-002": Changing,
    "FALSIFY-ATTN-SUB-005": Changing,
    "FALSIFY-APRT-PROMISE-004": Hiding,
    "FALSIFY-Q4K-PARITY-001": lambda: numpy_engine({(1, "ffn_up"): rolled}),
    "FALSIFY-Q4K-PARITY-002": lambda: numpy_engine({(1, "ffn_up"): rolled}),
    "FALSIFY-Q4K-PARITY-003": lambda: numpy_engine({(0, "post_ffn_residual"): rolled}),
    "FALSIFY-Q4K-PARITY-004": lambda: numpy_engine({(3, "ffn_gate"): scaled(0.4)}),
    "FALSIFY-Q4K-PARITY-005": lambda: numpy_engine({(2, "ffn_norm"): scaled(1.01)}),
    "FALSIFY-DECODE-PARITY-001": lambda: numpy_engine({(None, "lm_head"): other_head}),
    "FALSIFY-DECODE-PARITY-002": lambda: numpy_engine({(None, "lm_head"): other_head}),
    "FALSIFY-DECODE-PARITY-003": lambda: numpy_engine(
        {(1, "q_post_rope"): wrong_beyond_the_prompt}
    ),
    "FALSIFY-DECODE-PARITY-005": lambda: Decoder(fixture_pair(), CACHE_FAULTS[0]),
    "FALSIFY-DECODE-PARITY-004": lambda: numpy_engine(
        {(None, "final_norm"): wrong_beyond_the_prompt}
    ),
}


@pytest.mark.parametrize("falsifier_id", ENGINES)
def test_it_fails_on_a_faulty_engine(falsifier_id, tmp_path):
    bench = bench_of(ENGINES[falsifier_id]())
    found = judge(falsifier_id, tmp_path, bench)
    assert found.outcome == "failed", found.detail


def test_single_step_parity_does_not_see_what_several_steps_see(tmp_path):
    bench = bench_of(ENGINES["FALSIFY-DECODE-PARITY-003"]())
    for blind in ("FALSIFY-DECODE-PARITY-001", "FALSIFY-DECODE-PARITY-002",
                  "FALSIFY-Q4K-PARITY-001", "FALSIFY-Q4K-PARITY-002"):  # fmt: skip
        assert judge(blind, tmp_path, bench).outcome == "passed"


def no_layers_option(monkeypatch):
    add = trace.add_arguments
    short = {"--save-tensor-layers": "--layers"}

    def renamed(parser):
        argument = parser.add_argument
        parser.add_argument = lambda name, **kw: argument(short.get(name, name), **kw)
        add(parser)

    row = next(c for c in own_commands() if c.name == "trace")
    rows = [c._replace(add_arguments=renamed) if c is row else c for c in own_commands()]
    monkeypatch.setattr("pytest_aprt.commands.main.COMMANDS", rows)


def own_commands():
    from pytest_aprt.commands.main import COMMANDS

    return COMMANDS


def blind_to_values(monkeypatch):
    monkeypatch.setattr(diffs, "diff_files", lambda a, b, n: original_diff(a, a, n))


original_diff = diffs.diff_files


def blind_to_layers(monkeypatch):
    def diff(a, b, n):
        if aprt.read_header(a)[0] != aprt.read_header(b)[0]:
            return original_diff(a, a, n)
        return original_diff(a, b, n)

    monkeypatch.setattr(diffs, "diff_files", diff)


def no_check_of_sizes(monkeypatch):
    def read(path, layer):
        return np.zeros(0, np.float32)

    monkeypatch.setattr(dumps.aprt, "read_tensor", read)


def no_selection_of_stages(monkeypatch):
    write = DumpWriter.write

    def both(self, layer, stage, value):
        write(self, layer, stage, value)
        if layer is not None:
            write(self, layer, "ffn_up", value)

    monkeypatch.setattr(DumpWriter, "write", both)


def every_layer(monkeypatch):
    write = DumpWriter.write

    def everywhere(self, layer, stage, value):
        for other in range(4):
            write(self, other, stage, value)

    monkeypatch.setattr(DumpWriter, "write", everywhere)


def first_row_alone(monkeypatch):
    write = DumpWriter.write
    monkeypatch.setattr(
        DumpWriter, "write", lambda self, layer, stage, value: write(self, layer, stage, value[:1])
    )


def head_in_a_layer(monkeypatch):
    write = DumpWriter.write
    monkeypatch.setattr(
        DumpWriter, "write", lambda self, layer, stage, value: write(self, 0, stage, value)
    )


def no_nan(monkeypatch):
    write = DumpWriter.write
    monkeypatch.setattr(
        DumpWriter,
        "write",
        lambda self, layer, stage, value: write(self, layer, stage, np.nan_to_num(value)),
    )


def other_values_by_command(monkeypatch):
    run = trace._run

    def changed(*args, **kwargs):
        for captured in run(*args, **kwargs):
            yield captured._replace(stages={k: v + 1 for k, v in captured.stages.items()})

    monkeypatch.setattr(trace, "_run", changed)


def reordered(monkeypatch):
    stages = dict(own.STAGES)
    stages["attn_scores"] = stages.pop("attn_scores")
    monkeypatch.setattr(own, "STAGES", stages)


def renamed_stage(monkeypatch):
    names = own.stages_named
    monkeypatch.setattr(own, "stages_named", lambda text: names(text.replace("SCORES", "softmax")))


def harmless_fault(monkeypatch):
    same = {**transitions.CHANGES, "roll": lambda x: x, "scale": lambda x: x}
    monkeypatch.setattr(transitions, "CHANGES", same)


def fault_elsewhere(monkeypatch):
    planted = transitions._planted
    monkeypatch.setattr(
        transitions, "_planted", lambda s, layer, stage, c: planted(s, layer, "qkv_bias", "roll")
    )


FAULTS = [
    ("FALSIFY-APR-TRACE-SAVE-001", no_layers_option),
    ("FALSIFY-APR-TRACE-SAVE-003", blind_to_values),
    ("FALSIFY-APR-TRACE-SAVE-004", no_check_of_sizes),
    ("FALSIFY-APR-TRACE-SAVE-005", no_selection_of_stages),
    ("FALSIFY-APR-TRACE-SAVE-006", no_nan),
    ("FALSIFY-APR-TRACE-SAVE-007", every_layer),
    ("FALSIFY-APR-TRACE-SAVE-009", blind_to_layers),
    ("FALSIFY-APR-TRACE-SAVE-010", head_in_a_layer),
    ("FALSIFY-APR-TRACE-SAVE-011", other_values_by_command),
    ("FALSIFY-ATTN-SUB-001", reordered),
    ("FALSIFY-ATTN-SUB-001", renamed_stage),
    ("FALSIFY-ATTN-SUB-002", first_row_alone),
    ("FALSIFY-ATTN-SUB-003", blind_to_values),
    ("FALSIFY-ATTN-SUB-004", harmless_fault),
    ("FALSIFY-ATTN-SUB-004", fault_elsewhere),
    ("FALSIFY-APRT-PROMISE-001", harmless_fault),
    ("FALSIFY-APRT-PROMISE-001", fault_elsewhere),
    ("FALSIFY-APRT-PROMISE-003", fault_elsewhere),
    ("FALSIFY-APRT-PROMISE-002", harmless_fault),
    ("FALSIFY-APRT-PROMISE-002", fault_elsewhere),
]


@pytest.mark.parametrize(("falsifier_id", "fault"), FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_it_fails_by_a_fault_in_this_package(falsifier_id, fault, tmp_path, monkeypatch):
    bench = healthy()
    fault(monkeypatch)
    found = judge(falsifier_id, tmp_path, bench)
    assert found.outcome == "failed", found.detail


def test_a_contract_that_is_not_valid_says_so(tmp_path):
    contract = CONTRACTS["apr-trace-save-tensor-v1.yaml"]
    text = contract.path.read_text().replace("  references:", "  sources:")
    path = tmp_path / contract.path.name
    path.write_text(text)
    found = judge("FALSIFY-APR-TRACE-SAVE-008", tmp_path, None, parse(text, path))
    assert found.outcome == "failed"
    assert f"{path}:4: error SCHEMA-001" in found.detail


def test_a_folder_with_a_contract_that_is_not_valid_says_so(tmp_path, monkeypatch):
    (tmp_path / "contracts").mkdir()
    (tmp_path / "contracts" / "a.yaml").write_text("metadata: {}\nfalsification_tests: []\n")
    monkeypatch.setattr("contract_bench.ROOT", tmp_path)
    found = judge("FALSIFY-APRT-PROMISE-006", tmp_path, None)
    assert found.outcome == "failed" and "SCHEMA-001" in found.detail


def test_memory_beyond_the_bound_is_told(tmp_path):
    report = {"run": {"peak_rss_bytes": 2_100_000_000}}
    bench = Bench(lambda: report, lambda side: None, lambda: None)
    found = judge("FALSIFY-APRT-PROMISE-005", tmp_path, bench)
    assert found.outcome == "failed" and "2.1e+09, expected at most 2e+09" in found.detail


BOUND_TO_A_TEST = """
metadata: {version: 1.0.0, kind: pattern, references: [a]}
falsification_tests:
  - {id: FALSIFY-N-001, rule: r, prediction: p, if_fails: f, test: "tests/test_n.py::test_n[64]"}
"""


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("assert 1 == 1", "passed"),
        ("assert 1 == 2", "failed"),
        ("pytest.skip('not here')", "blocked"),
    ],
)
def test_a_claim_bound_to_a_test_is_what_the_test_says(body, outcome, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "tests" / "test_n.py").write_text(
        f"import pytest\n@pytest.mark.parametrize('n', [64])\ndef test_n(n):\n    {body}\n"
    )
    contract = parse(BOUND_TO_A_TEST, tmp_path / "contracts" / "n-v1.yaml")
    found = judge("FALSIFY-N-001", tmp_path, None, contract)
    assert (found.outcome, found.by) == (outcome, "pytest"), found.detail


def test_every_falsifier_has_a_planted_fault_here():
    covered = {*ENGINES, *(falsifier_id for falsifier_id, _ in FAULTS)}
    covered |= {
        "FALSIFY-APR-TRACE-SAVE-008",
        "FALSIFY-APRT-PROMISE-005",
        "FALSIFY-APRT-PROMISE-006",
    }
    assert covered == set(IDS)


def test_without_a_model_they_are_blocked_or_hold(tmp_path):
    outcomes = {i: judge(i, tmp_path / i, None) for i in IDS}
    for falsifier_id, found in outcomes.items():
        assert found.outcome == ("passed" if found.needs == "nothing" else "blocked"), falsifier_id
        if found.outcome == "blocked":
            assert "no model under test" in found.detail
