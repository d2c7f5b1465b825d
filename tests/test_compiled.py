"""The compiled functions, each kind of processor's, against float64; and that all does without.

What decodes blocks is tested in test_dequant.py, the sieve in test_distances.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from harness import FIXTURES

from pytest_aprt import compiled
from pytest_aprt.compiled import PROCESSOR, TOKENS, product_of

COLUMNS = (16, 768, 784, 3584)
avx512 = pytest.mark.skipif(PROCESSOR != "avx512", reason="no AVX-512 here: torch multiplies")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@avx512
@pytest.mark.parametrize(("tokens", "columns"), [*product(range(1, TOKENS + 1), COLUMNS)])
def test_products_are_exact(tokens, columns):
    """Of what such products are in the mean; measured: at most 2.3e-7, where oneDNN has 6.6e-7."""
    for rows in (1, 3, 4, 41):
        x, w = numbers(tokens, columns), numbers(rows, columns, seed=1)
        expected = x.double() @ w.double().T
        out = torch.full((tokens, rows + 5), torch.nan)
        assert product_of()(x, w, out, 3)
        assert out[:, :3].isnan().all() and out[:, rows + 3 :].isnan().all()
        error = (out[:, 3 : rows + 3].double() - expected).norm()
        assert error < 5e-7 * x.norm() * w.norm() / columns**0.5


@avx512
def test_what_is_not_finite_stays_in_its_row_and_column():
    x, w = numbers(9, 512), numbers(11, 512, seed=1)
    x[4, 100], w[7, 511] = torch.nan, torch.inf
    out = torch.zeros(9, 11)
    assert product_of()(x, w, out, 0)
    assert torch.equal(out.isfinite(), (x @ w.T).isfinite())
    assert out[4].isnan().all() and out[:4, 7].isinf().all()


@pytest.mark.parametrize(
    ("x", "columns"),
    [((TOKENS + 1, 32), 32), ((2, 24), 24), ((2, 8), 8)],
    ids=["many tokens", "columns by eight", "few columns"],
)
def test_what_it_is_not_for_is_left(x, columns):
    out = torch.zeros(x[0], 3)
    assert not product_of()(numbers(*x), numbers(3, columns), out, 0)
    assert not product_of()(numbers(2, 32).double(), numbers(3, 32).double(), out, 0)
    assert not out.any()


@pytest.mark.parametrize("processor", ["avx2", "of another maker"])
def test_other_processors_leave_products_to_torch(processor):
    assert not product_of(processor)(numbers(2, 32), numbers(3, 32), torch.zeros(2, 3), 0)


@pytest.mark.skipif(not PROCESSOR, reason="built without a C compiler, or for another processor")
def test_memory_in_pieces_is_left_or_refused():
    blocks, out = torch.zeros(4, 36, dtype=torch.uint8)[:, :18], torch.zeros(4, 32)
    for given in ((blocks, out), (blocks.contiguous(), out.double())):
        with pytest.raises(ValueError, match="in one piece"):
            compiled.unpack_of("Q4_0")(*given)
    assert not product_of()(numbers(32, 2).T, numbers(3, 32), torch.zeros(2, 3), 0)
    assert not product_of()(numbers(2, 32), numbers(32, 3).T, torch.zeros(2, 3), 0)
    assert not product_of()(numbers(2, 32), numbers(3, 32), torch.zeros(3, 2).T, 0)


def test_a_library_of_another_machine_counts_as_none(tmp_path, monkeypatch):
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"MZ of some other machine")
    monkeypatch.setattr(compiled, "find_spec", lambda name: SimpleNamespace(origin=str(broken)))
    assert compiled._loaded() is None
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    assert compiled._loaded() is None


def test_a_whole_run_does_without(tmp_path):
    """The same verdict and statuses, at every point, with and without."""
    found = {}
    for kernels in ("", "torch"):
        out = tmp_path / (kernels or "compiled")
        code = "import pytest_aprt.compiled as c, pytest, sys; "
        code += "assert not (sys.argv.pop(1) and c.PROCESSOR); sys.exit(pytest.main(sys.argv[1:]))"
        fixture = FIXTURES / "tiny-qwen2"
        command = [sys.executable, "-c", code, kernels, "-q", "-p", "no:cacheprovider", "-c",
                   os.devnull, f"--rootdir={tmp_path}", f"--aprt-model={fixture / 'q4_k_m.gguf'}",
                   f"--aprt-oracle={fixture / 'hf'}", f"--aprt-report={out}"]  # fmt: skip
        env = {**os.environ, "APRT_KERNELS": kernels}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads((out / "report.json").read_text())
        points = {(p["layer"], p["stage"]): p["status"] for p in report["points"]}
        found[kernels] = report["verdict"]["status"], points
    assert found[""] == found["torch"]
    assert found[""][0] == "QUANTISATION_NOISE" and len(found[""][1]) > 30
