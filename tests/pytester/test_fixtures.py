"""The fixtures for tests of a user's own."""

from __future__ import annotations

import pytest

MINE = """
    import numpy as np
    import pytest

    def test_stages(aprt_model, aprt_oracle, aprt_run):
        tokens = aprt_model.tokens
        assert tokens == aprt_oracle.tokens == (1, 2, 3, 4, 5)
        assert list(aprt_model) == [point["point"] for point in aprt_run["points"]]
        assert len(aprt_model) == len(aprt_oracle) == 54
        q = aprt_model["L02-q_post_rope"]
        assert (type(q), q.dtype, q.shape) == (np.ndarray, np.float32, (5, 56))
        assert np.array_equal(q, aprt_model.stage(2, "q_post_rope"))
        assert aprt_oracle["L00-attn_scores"].shape == (4, 5, 5)
        assert np.array_equal(aprt_oracle.stage(0, "layer_output"),
                              aprt_oracle["L00-post_ffn_residual"])
        assert aprt_model["lm_head"].shape == (97,)
        assert np.abs(aprt_model["L00-attn_norm"] - aprt_oracle["L00-attn_norm"]).max() < 1e-5
        assert np.abs(aprt_model["L01-ffn_silu"] - aprt_oracle["L01-ffn_silu"]).max() > 0.1
        with pytest.raises(KeyError, match="L99-ffn_silu was not captured; these were: L00-embed"):
            aprt_model["L99-ffn_silu"]
        assert "L99-ffn_silu" not in aprt_model

    def test_prompts(aprt_model, aprt_run):
        second = aprt_model.prompt(1)
        assert second.tokens == (7, 8, 9) == tuple(aprt_run["run"]["prompts"][1]["tokens"])
        assert second["L00-attn_norm"].shape == (3, 56)
        with pytest.raises(IndexError, match="prompt 2 was not run: expected 0 to 1"):
            aprt_model.prompt(2)

    def test_points(aprt_point, aprt_model, aprt_oracle):
        model, oracle = aprt_model[aprt_point], aprt_oracle[aprt_point]
        assert aprt_point.layer in (1, None)
        assert np.linalg.norm(model - oracle) <= 1e-4 * np.linalg.norm(oracle)

    def test_run(aprt_run):
        assert aprt_run["verdict"]["first_divergence"]["point"] == "L01-ffn_silu"
"""


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "-n2"])
def test_stages_points_and_the_run(faulty, workers):
    faulty.pytester.makepyfile(test_mine=MINE)
    result = faulty("test_mine.py", "--aprt-tokens=7,8,9", "--aprt-layers=1", "-v", *workers)
    # 17 points of layer 1, of which the last four are off or follow, and two of the whole model
    result.assert_outcomes(passed=3 + 13, failed=6)
    failed = {line.split()[1] for line in result.outlines if line.startswith("FAILED")}
    assert failed == {
        f"test_mine.py::test_points[{point}]"
        for point in (
            "L01-ffn_silu",
            "L01-ffn_swigl",
            "L01-ffn_out",
            "L01-post_ffn_residual",
            "final_norm",
            "lm_head",
        )
    }
    assert faulty.runs() == 2  # one for each prompt
    again = faulty("test_mine.py", "--aprt-tokens=7,8,9", "--aprt-layers=1", "--lf", *workers)
    again.assert_outcomes(failed=6)


def test_without_a_model_such_tests_are_skipped_and_say_why(pytester):
    pytester.makepyfile(test_mine=MINE)
    result = pytester.runpytest_inprocess("-rs", "-pno:randomly")
    result.assert_outcomes(skipped=4)
    result.stdout.fnmatch_lines(
        ["SKIPPED * no model under test: give --aprt-model and --aprt-oracle"]
    )


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "-n2"])
def test_models_run_only_if_a_selected_test_asks(faulty, workers):
    faulty.pytester.makepyfile(
        test_mine="""
        import pytest

        def test_plain():
            pass

        @pytest.fixture
        def mine(aprt_run):
            return aprt_run["verdict"]["status"]

        def test_through_a_fixture(mine):
            assert mine == "DIVERGED"
        """
    )
    faulty("test_mine.py", "-k", "plain", *workers).assert_outcomes(passed=1)
    assert faulty.runs() == 0
    faulty("test_mine.py", *workers).assert_outcomes(passed=2)
    assert faulty.runs() == 1


def test_a_fixture_that_is_asked_for_too_late_says_so(faulty):
    faulty.pytester.makepyfile(
        test_mine="""
        def test_late(request):
            request.getfixturevalue("aprt_run")

        def test_later(request, aprt_run):
            request.getfixturevalue("aprt_model")
        """
    )
    result = faulty("test_mine.py::test_late")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*the models were not run, since no selected test names aprt_*"])
    result = faulty("test_mine.py::test_later")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*the captured stages were not kept, since no selected test*"])


def test_one_own_test_may_look_at_a_stage_that_the_engine_lacks(faulty):
    conftest = faulty.path / "conftest.py"
    conftest.write_text(
        conftest.read_text().replace(
            "        yield from super().layers(tokens)\n",
            "        for layer, stages in super().layers(tokens):\n"
            "            stages = {k: v for k, v in stages.items() if k != 'ffn_gate'}\n"
            "            yield layer, stages\n",
        )
    )
    faulty.pytester.makepyfile(
        test_mine="""
        def test_missing(aprt_model, aprt_oracle):
            assert "L00-ffn_gate" not in aprt_model
            assert "L00-ffn_gate" in aprt_oracle
            assert aprt_model.get("L00-ffn_gate") is None
            assert len(aprt_model) == len(aprt_oracle) - 3
        """
    )
    faulty("test_mine.py").assert_outcomes(passed=1)
