"""Measures the main job on a pair of a real model's shape, beside what a user would do today.

    python tests/benchmarks/main_job.py --shape 0.5b [--folder DIR]

The pair is random (``synthetic.py``, extra ``llamacpp``) and made in DIR where it is not there yet:
1.4 GB for 0.5b, 11 GB for 7b-half, 20 GB for 7b. Every row of the table is a process of its own,
warm, one after the other (Linux): the whole pytest command with its report, without other plugins,
without steps to decode (the median of three), the same without what is compiled (the median of
three, in turn with those), and with steps; transformers on both sides with a hook on every module,
which neither decodes nor compares (extra ``test``); and what the machine can do at best. Where the
time goes is the mean of three further runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from synthetic import SHAPES, make
from tabulate import tabulate

from pytest_aprt.compiled import PROCESSOR

DISK_GB = {"tiny": 0.1, "0.5b": 1.5, "mid": 1.5, "7b-half": 11, "7b": 20}
TOKENS = (3838, 374, 220, 17, 10, 17, 30)  # "What is 2+2?" as Qwen2.5 splits it
FLOAT32_FITS = ("tiny", "0.5b", "mid")
NO_STEPS = "--aprt-decode-steps=0"
IMPORTING = "importing"  # as sampling.py calls it
NOT_COMPILED = {"APRT_KERNELS": "torch"}
RUNS = 3  # of the main job: one alone may be a tenth slower than the next
SPARE_GB = 1.5  # memory left to the machine: a process that takes more is ended

# Python keeps what it compiles, as it does for users; other plugins take time of their own.
_ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
_ENVIRONMENT["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

TODAY = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, file, dtype, tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=getattr(torch, dtype), attn_implementation="eager",
    **({"gguf_file": file} if file else {}))
captured = {}
for name, module in model.named_modules():
    module.register_forward_hook(
        lambda module, inputs, output, name=name: captured.__setitem__(name, output))
with torch.no_grad():
    model(torch.tensor([[int(token) for token in tokens.split(",")]]))
"""


@dataclass(frozen=True)
class Ran:
    """What a process took with its children; ``ended`` says why it was stopped, if it was."""

    wall_s: float
    cpu_s: float
    anonymous: int  # peaks, bytes
    file_backed: int
    ended: str = ""


def ran(command: list[str], limit_s: float, env: dict[str, str] | None = None) -> Ran:
    """Run a process to its end, or to the limit of time or of the machine's memory."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - SPARE_GB * 1e9
    started, anonymous, file_backed, ended = time.perf_counter(), 0, 0, ""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env={**_ENVIRONMENT, **(env or {})}
        )
        pid = 0
        while not pid:
            family = _family(process.pid)
            anonymous = max(anonymous, sum(_status(each, "RssAnon") for each in family))
            file_backed = max(file_backed, sum(_status(each, "RssFile") for each in family))
            if not ended and time.perf_counter() - started > limit_s:
                ended = f"ended at {limit_s:.0f} s"
                process.kill()
            if not ended and anonymous > most:
                ended = f"ended at {anonymous / 1e9:.1f} GB"
                process.kill()
            time.sleep(0.05)
            pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(code)
        wall = time.perf_counter() - started
        if process.returncode and not ended:
            said.seek(0)
            sys.exit(f"{' '.join(command)[:200]} failed:\n{said.read().decode()[-3000:]}")
    return Ran(wall, usage.ru_utime + usage.ru_stime, anonymous, file_backed, ended)


def _family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for each in found:
        for listed in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, listed.read_text().split())
    return found


def _status(pid: int, key: str) -> int:
    try:
        found = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def pair(shape: str, folder: Path) -> Path:
    """Return the folder of the pair, which is made where it is not there."""
    target, done = folder / shape, folder / shape / "done"
    if done.exists():
        return target
    needs = DISK_GB[shape] * 1e9
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < needs:
        sys.exit(f"--shape {shape} needs about {needs / 1e9:g} GB of disk: {folder} has "
                 f"{free / 1e9:.1f} GB left, name another --folder")  # fmt: skip
    print(f"making a pair of {DISK_GB[shape]:g} GB in {target}", flush=True)
    make(SHAPES[shape], target)
    done.touch()
    return target


def main_job(at: Path, report: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "pytest", "-p", "pytest_aprt.plugin", "-q",
        "-p", "no:cacheprovider", "--rootdir", str(at),
        "-c", os.devnull, f"--aprt-model={at / 'model.gguf'}", f"--aprt-oracle={at / 'hf'}",
        f"--aprt-tokens={','.join(map(str, TOKENS))}", f"--aprt-report={report}", *more,
    ]  # fmt: skip


def today(at: Path, file: str, dtype: str) -> list[str]:
    folder = at if file else at / "hf"
    return [sys.executable, "-c", TODAY, str(folder), file, dtype, ",".join(map(str, TOKENS))]


def limits(at: Path) -> list[tuple[str, str]]:
    """What the machine can do: each the best of three."""
    files = [at / "model.gguf", *(at / "hf").glob("*.safetensors")]
    size = sum(file.stat().st_size for file in files)
    read_s = _best(lambda: [_read(file) for file in files])
    block = torch.ones(1 << 28)  # 1 GB
    sum_s, copy_s = _best(block.sum), _best(block.clone)
    x, w = torch.randn(len(TOKENS), 3584), torch.randn(18944, 3584)
    skinny_s, a = _best(lambda: x @ w.T), torch.randn(2048, 2048)
    square_s = _best(lambda: a @ a)
    size /= 1e9
    return [
        ("files read once, warm", f"{read_s:.2f} s ({size:.2f} GB, {size / read_s:.1f} GB/s)"),
        ("memory read", f"{4 * len(block) / sum_s / 1e9:.1f} GB/s"),
        ("memory copied into fresh pages", f"{8 * len(block) / copy_s / 1e9:.1f} GB/s"),
        ("float32 GEMM of 7 rows", f"{2 * x.numel() * len(w) / skinny_s / 1e9:.0f} GFLOP/s"),
        ("float32 GEMM, square", f"{2 * 2048**3 / square_s / 1e9:.0f} GFLOP/s"),
    ]  # fmt: skip


def _best(function) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def _read(path: Path) -> None:
    buffer = bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def shares(at: Path, report: Path, limit_s: float) -> dict[str, float]:
    """Return where the main job's time goes, from runs that are looked at."""
    found = report.parent / "samples.json"
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    total: Counter[str] = Counter()
    for _ in range(RUNS):
        ran(main_job(at, report, NO_STEPS, "-p", "sampling"), limit_s,
            {"PYTHONPATH": path, "APRT_SAMPLES": str(found)})  # fmt: skip
        total.update(json.loads(found.read_text())["shares"])
    return {what: share / RUNS for what, share in total.most_common()}


def median(runs: list[Ran]) -> Ran:
    return sorted(runs, key=lambda run: run.wall_s)[len(runs) // 2]


def table(ours: Ran, others: dict[str, Ran], theirs: dict[str, Ran]) -> str:
    rows = []
    named = {"pytest, --aprt-decode-steps=0": ours, **others, **theirs}
    if theirs:
        named["transformers, both"] = Ran(
            sum(r.wall_s for r in theirs.values()),
            sum(r.cpu_s for r in theirs.values()),
            max(r.anonymous for r in theirs.values()),
            max(r.file_backed for r in theirs.values()),
            ", ".join(r.ended for r in theirs.values() if r.ended),
        )
    for name, r in named.items():
        more = "at least " if r.ended else ""
        rows.append([
            name, f"{r.wall_s:.1f}", f"{r.cpu_s:.1f}", f"{r.anonymous / 1e9:.2f}",
            f"{r.file_backed / 1e9:.2f}", f"{more}{r.wall_s / ours.wall_s:.1f}",
            f"{more}{r.anonymous / ours.anonymous:.1f}", r.ended,
        ])  # fmt: skip
    head = ["", "wall s", "CPU s", "anonymous GB", "file-backed GB", "wall ratio",
            "anonymous ratio", ""]  # fmt: skip
    return tabulate(rows, head, "github", disable_numparse=True,
                    colalign=("left", *("right",) * 6, "left"))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--folder", type=Path, help="where pairs are kept; default a temporary one")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS",
                        help="for every process; default %(default)s")  # fmt: skip
    parser.add_argument("--only-ours", action="store_true", help="leave transformers out")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        at = pair(asked.shape, asked.folder or Path(temporary) / "pairs")
        report = Path(temporary) / "report"
        machine = limits(at)  # which reads the files: from here on all is warm
        ran(main_job(at, report, NO_STEPS), asked.limit)  # which compiles modules
        decoding = ran(main_job(at, report), asked.limit)
        runs, plain = [], []
        for _ in range(RUNS):
            runs.append(ran(main_job(at, report, NO_STEPS), asked.limit))
            plain.append(ran(main_job(at, report, NO_STEPS), asked.limit, NOT_COMPILED))
        ours = median(runs)
        others = {"  nothing compiled": median(plain), "pytest, 3 steps decoded": decoding}
        verdict = json.loads((report / "report.json").read_text())["verdict"]["status"]
        dtype = "float32" if asked.shape in FLOAT32_FITS else "bfloat16"
        theirs = {}
        if not asked.only_ours:
            theirs = {
                f"transformers, oracle ({dtype})": ran(today(at, "", dtype), asked.limit),
                f"transformers, GGUF ({dtype})": ran(today(at, "model.gguf", dtype), asked.limit),
            }
        where = shares(at, report, asked.limit)
    packages = ("pytest-aprt", "torch", "transformers", "gguf", "numpy")
    print(f"\n{asked.shape}, {len(TOKENS)} tokens, verdict {verdict}, "
          f"compiled for {PROCESSOR or 'nothing'}; "
          f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          + ", ".join(f"{p} {version(p)}" for p in packages) + "\n")  # fmt: skip
    print(table(ours, others, theirs), "\n")
    print(tabulate(machine, ["the machine's limits", ""], "github"), "\n")
    rest = 1 - where.get(IMPORTING, 0)
    rows = [[what, f"{share:.1%}", "" if what == IMPORTING else f"{share / rest:.1%}"]
            for what, share in where.items()]  # fmt: skip
    head = ["the main job's time", "share", "after imports"]
    print(tabulate(rows, head, "github", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
