"""Whole runs over dump folders, sound ones and damaged ones."""

from __future__ import annotations

import json
import shutil
import struct

import harness
import pytest
from short_summary import one_line

from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.pair import open_headers, open_pair
from pytest_aprt.sources.aprt import WHOLE_MODEL, write_tensor

TOKENS = (1, 2, 3, 4, 5)
OTHER = (1, 2, 3, 4, 6)
VICTIM = "layer-1/ffn_up.bin"


@pytest.fixture(scope="session")
def dumps(pair, tmp_path_factory):
    """Dumps of model and oracle on two prompts, without manifests."""
    folder = tmp_path_factory.mktemp("dumps")
    opened = open_pair(open_headers(*map(str, pair)))
    sides = {
        "model": harness.builtin(opened),
        "oracle": TransformersRunner(opened.config, opened.oracle_weights),
    }
    for tokens, name in ((TOKENS, ""), (OTHER, "-other")):
        for side, engine in sides.items():
            for layer, stages in engine.layers(tokens):
                place = folder / f"{side}{name}" / ("" if layer is None else f"layer-{layer}")
                for stage, value in stages.items():
                    number = WHOLE_MODEL if layer is None else layer
                    write_tensor(place / f"{stage}.bin", number, value.numpy())
    return folder


@pytest.fixture
def start(pytester, pair, dumps):
    """Run pytest over a copy of a dump, with and without the weights behind it."""

    def start(model, *args, weights=True, oracle=None, tokens=TOKENS):
        given = [f"--aprt-model={model}", f"--aprt-oracle={oracle or pair[1]}"]
        given += [f"--aprt-weights={pair[0]}"] if weights else []
        given += [f"--aprt-tokens={','.join(map(str, tokens))}"] if tokens else []
        return pytester.runpytest_inprocess("-pno:randomly", *given, "--aprt-report=out", *args)

    return start


@pytest.fixture
def copied(pytester, dumps):
    """A copy of a dump in the current folder."""
    return lambda name="model": shutil.copytree(dumps / name, pytester.path / name)


def verdict(pytester):
    return json.loads((pytester.path / "out" / "report.json").read_text())["verdict"]


def test_a_dump_with_weights(start, copied, pytester):
    result = start(copied())
    assert result.ret == 0
    assert verdict(pytester)["status"] == "PARITY"


def test_a_dump_without_weights_says_what_could_not_be_judged(start, copied, pytester):
    result = start(copied(), "-rs", weights=False)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["PARITY: all *points agree on total alone*",
         "note: total alone was judged: without --aprt-weights there is no shadow and no*"]
    )  # fmt: skip
    result.assert_outcomes(passed=6 + 54 + 1 + 1, skipped=1 + 18 + 14 + 1 + 5 + 1)
    markdown = (pytester.path / "out" / "report.md").read_text()
    assert "total alone was judged: without --aprt-weights" in markdown


def test_a_dump_without_weights_that_is_far_off(start, copied, pytester, pair):
    path = copied()
    value = struct.unpack("<f", (path / VICTIM).read_bytes()[12:16])[0]
    data = bytearray((path / VICTIM).read_bytes())
    data[12:16] = struct.pack("<f", value + 1000)
    (path / VICTIM).write_bytes(data)
    result = start(path, weights=False)
    assert result.ret == 1
    found = verdict(pytester)
    assert found["status"] == "INCONCLUSIVE"
    assert (
        "total is beyond its threshold at 1 of 54 points, first at L01-ffn_up" in found["summary"]
    )
    result = start(path)
    assert result.ret == 1
    assert verdict(pytester)["first_divergence"]["point"] == "L01-ffn_up"


@pytest.mark.parametrize("weights", [True, False])
def test_two_dumps(start, copied, pytester, weights):
    ours, theirs = copied(), copied("oracle")
    result = start(ours, weights=weights, oracle=theirs)
    if weights:
        assert result.ret == 0
        assert verdict(pytester)["status"] == "PARITY"
        result.stdout.fnmatch_lines(["note: total alone was judged: the oracle is a dump, so*"])
    else:
        assert "the shapes of its stages are not known" in one_line(result)


# Damage: one clear error, or a recognised capture


def truncated(path):
    path.write_bytes(path.read_bytes()[:-6])


def of_another_layer(path):
    data = path.read_bytes()
    path.write_bytes(data[:4] + struct.pack("<I", 0) + data[8:])


def empty(path):
    path.write_bytes(b"")


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def folder_instead(path):
    path.unlink()
    path.mkdir()


def text(path):
    path.write_text("nothing of the kind, but long enough")


def lying(path):
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<I", 2**31) + data[12:])


def unknown(path):
    path.rename(path.with_name("ffn_uppp.bin"))


DAMAGES = {
    truncated: "as its header counts",
    of_another_layer: "expected layer 1 in the header, found layer 0",
    empty: "found 0 bytes",
    loop: "ffn_up.bin: cannot be opened: ",
    folder_instead: "ffn_up.bin: expected an APRT tensor",
    text: "12 bytes of header that begin with b'APRT'",
    lying: "as its header counts 2147483648 elements",
    unknown: "expected a stage's name",
}


@pytest.mark.parametrize("side", ["model", "model alone", "oracle"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_file_is_one_clear_error(start, copied, pytester, pair, damage, side):
    path = copied(side.split()[0])
    damage(path / VICTIM)
    if side == "oracle":
        result = start(pair[0], oracle=path)
    else:
        result = start(path, weights=side == "model")
    said = one_line(result)
    assert DAMAGES[damage] in said and "layer-1" in said
    assert not (pytester.path / "out").exists()


def another_prompt(copied, dumps):
    return copied("model-other")


def stale_layer(copied, dumps):
    path = copied()
    shutil.copytree(dumps / "model-other" / "layer-2", path / "layer-2", dirs_exist_ok=True)
    return path


def one_layer_twice(copied, dumps):
    path = copied()
    for source in (path / "layer-1").iterdir():
        data = source.read_bytes()
        (path / "layer-2" / source.name).write_bytes(data[:4] + struct.pack("<I", 2) + data[8:])
    return path


def of_a_longer_prompt(copied, dumps):
    path = copied()
    for source in path.glob("layer-*/ffn_up.bin"):
        data = source.read_bytes()
        head, body = data[:12], data[12:]
        source.write_bytes(head[:8] + struct.pack("<I", len(body) // 2) + body * 2)
    return path


CAPTURES = {
    another_prompt: ("INCONCLUSIVE", "row 4 of its embedding is that of token 6"),
    one_layer_twice: ("INCONCLUSIVE", "layers 1 and 2 hold the same bytes"),
    of_a_longer_prompt: ("INCONCLUSIVE", "L00-ffn_up"),
}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("capture", CAPTURES, ids=lambda c: c.__name__)
def test_a_broken_capture_is_recognised(start, copied, dumps, pytester, capture, weights):
    result = start(capture(copied, dumps), weights=weights)
    assert result.ret == 1
    found = verdict(pytester)
    status, says = CAPTURES[capture]
    assert found["status"] == status and says in found["summary"]


def test_a_stale_layer_is_no_parity(start, copied, dumps, pytester):
    """The layer's own input is another prompt's: it shows where the stale layer begins."""
    result = start(stale_layer(copied, dumps))
    assert result.ret == 1
    assert verdict(pytester)["first_divergence"]["point"] == "L02-attn_norm"


@pytest.mark.parametrize("weights", [True, False])
def test_a_manifest_of_another_prompt(pytester, pair, weights):
    gguf, hf = pair
    live = (f"--aprt-model={gguf}", f"--aprt-oracle={hf}")
    assert pytester.runpytest_inprocess(*live, "--aprt-tokens=1,2,3", "--aprt-dump=d").ret == 0
    given = ["--aprt-model=d/model", live[1], *([f"--aprt-weights={gguf}"] if weights else [])]
    result = pytester.runpytest_inprocess(*given, "--aprt-tokens=1,2,4")
    assert "d/model holds no run on the tokens [1, 2, 4]: expected [1, 2, 3]" in one_line(result)
    assert pytester.runpytest_inprocess(*given).ret == 0
    shutil.copy("d/model/layer-0/ffn_up.bin", "d/model/layer-0/ffn_gate.bin")
    said = one_line(pytester.runpytest_inprocess(*given))
    assert "ffn_gate.bin: expected sha256" in said and "dump it anew" in said
    (pytester.path / "d/model/layer-0/ffn_gate.bin").unlink()
    assert "is missing" in one_line(pytester.runpytest_inprocess(*given))


def test_swapped_sides(pytester, request):
    """The names of the two folders of --aprt-dump, the wrong way round."""
    files = request.config.rootpath / "fixtures" / "tiny-qwen2"
    live = (f"--aprt-model={files / 'q4_k_m.gguf'}", f"--aprt-oracle={files / 'hf'}")
    assert pytester.runpytest_inprocess(*live, "--aprt-tokens=1,2,3", "--aprt-dump=d").ret == 0
    weights = live[0].replace("model", "weights")
    result = pytester.runpytest_inprocess("--aprt-model=d/oracle", weights, live[1])
    assert result.ret == 1
    result.stdout.fnmatch_lines(["INCONCLUSIVE: the self-test 'capture' failed: the model's*"])
    result = pytester.runpytest_inprocess("--aprt-model=d/oracle", "--aprt-oracle=d/model", weights)
    assert result.ret == 4 or "PARITY" not in result.stdout.str()
