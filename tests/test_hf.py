"""HfFolder on folders written by safetensors, on a hub cache, and on damaged ones."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub import errors as hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from pytest_aprt.errors import SourceError
from pytest_aprt.sources.hf import HfFolder

CONFIG = {"architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def values(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


TENSORS = {
    "model.embed_tokens.weight": values(10, 4, dtype=torch.bfloat16),
    "model.layers.0.self_attn.q_proj.weight": values(4, 4, dtype=torch.float16),
    "model.norm.weight": values(4),
    "model.wide": values(2, 3, dtype=torch.float64),
    "packed": torch.arange(6, dtype=torch.int32),
    "float8": torch.zeros(4, dtype=torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5),
}


def write(folder, *, shards=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if shards is None:
        save_file(TENSORS, folder / SINGLE)
        return folder
    names = list(TENSORS)
    parts = {shards[0]: names[:3], shards[1]: names[3:]}
    for shard, part in parts.items():
        save_file({name: TENSORS[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(params=[None, SHARDS], ids=["single", "sharded"])
def folder(request, tmp_path):
    return write(tmp_path / "model", shards=request.param)


def test_reads(folder):
    with HfFolder.open(str(folder)) as model:
        assert (model.source, model.path, model.config) == (str(folder), folder, CONFIG)
        assert set(model.names) == set(TENSORS) and "model.norm.weight" in model.names
        assert model.shape("model.embed_tokens.weight") == (10, 4)
        assert model.dtype("model.embed_tokens.weight") == "BF16"
        assert model.shape("scalar") == ()
        for name, stored in TENSORS.items():
            if name in ("packed", "float8"):
                continue
            got = model.tensor(name)
            assert got.dtype == torch.float32 and torch.equal(got, stored.to(torch.float32))


def test_rows(folder):
    with HfFolder.open(str(folder)) as model:
        whole = model.tensor("model.embed_tokens.weight")
        for wanted in ([], [9], [3, 0, 3], range(2, 5), torch.tensor([1, 2])):
            got = model.rows("model.embed_tokens.weight", wanted)
            assert got.dtype == torch.float32 and torch.equal(
                got, whole[torch.tensor(list(wanted), dtype=torch.int64)]
            )
        for bad in ([10], [-1]):
            with pytest.raises(SourceError, match=r"embed_tokens.weight.*expected 0 to 9"):
                model.rows("model.embed_tokens.weight", bad)
        with pytest.raises(SourceError, match="'scalar' has no rows"):
            model.rows("scalar", [0])


@pytest.mark.parametrize(("name", "dtype"), [("packed", "I32"), ("float8", "F8_E4M3")])
def test_refuses_what_is_no_float(folder, name, dtype):
    with HfFolder.open(str(folder)) as model:
        assert model.dtype(name) == dtype
        for read in (lambda: model.tensor(name), lambda: model.rows(name, [0])):
            with pytest.raises(SourceError, match=rf"'{name}': expected one of .*found {dtype}"):
                read()


def test_unknown_tensor_names_close_ones(folder):
    with HfFolder.open(str(folder)) as model:
        for ask in (model.tensor, model.shape, model.dtype):
            with pytest.raises(
                SourceError, match=r"no tensor 'model.norm.bias'.*model.norm.weight"
            ):
                ask("model.norm.bias")


def test_tensors_outlive_close(folder):
    model = HfFolder.open(str(folder))
    norm = model.tensor("model.norm.weight")
    model.close()
    model.close()
    assert torch.equal(norm, TENSORS["model.norm.weight"])


def test_writing_to_a_tensor_leaves_the_file(folder):
    with HfFolder.open(str(folder)) as model:
        model.tensor("model.norm.weight").zero_()
    with HfFolder.open(str(folder)) as model:
        assert torch.equal(model.tensor("model.norm.weight"), TENSORS["model.norm.weight"])


def test_sha256(folder):
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
    with HfFolder.open(str(folder)) as model:
        assert model.sha256() == hashlib.sha256(data).hexdigest()


def test_single_file_wins_over_an_index(tmp_path):
    folder = write(write(tmp_path / "model", shards=SHARDS))
    (folder / SHARDS[0]).unlink()
    with HfFolder.open(str(folder)) as model:
        assert set(model.names) == set(TENSORS)


def test_opening_needs_neither_torch_nor_hub(folder):
    code = (
        "import sys; from pytest_aprt.sources.hf import HfFolder\n"
        f"HfFolder.open({str(folder)!r})\n"
        "print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Bad folders


def put(name, content):
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def gone(name):
    return lambda folder: (folder / name).unlink()


def instead(name):
    return lambda folder: (folder / SINGLE).rename(folder / name)


def cut(name, keep):
    return lambda folder: os.truncate(folder / name, keep)


def a_folder(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def loop(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return change


DEEP = "[" * 200_000
BAD_SINGLE = {
    "no config": (gone("config.json"), "found no config.json"),
    "config is a folder": (a_folder("config.json"), "found no config.json"),
    "config is no JSON": (put("config.json", '{"a":'), r"config.json: expected valid JSON"),
    "config is empty": (put("config.json", ""), "config.json: expected valid JSON"),
    "config is no text": (put("config.json", b"\xff\xfe"), "config.json: expected valid JSON"),
    "config is deep": (put("config.json", DEEP), "config.json: expected valid JSON"),
    "config is a list": (put("config.json", "[1]"), "expected a JSON object, found a list"),
    "no weights": (gone(SINGLE), "expected model.safetensors or .*found no weights"),
    "pickled weights": (instead("pytorch_model.bin"), "pickled weights: convert"),
    "pickled shards": (instead("pytorch_model-00001-of-00002.bin"), "pickled weights: convert"),
    "adapter": (instead("adapter_model.safetensors"), "an adapter alone: merge it"),
    "gguf": (instead("model-q4.gguf"), "a GGUF file: name that file"),
    "other names": (instead("model.fp16.safetensors"), "other safetensors files"),
    "weights are a folder": (a_folder(SINGLE), "expected a safetensors file, found a folder"),
    "weights are a loop": (loop(SINGLE), r"model.safetensors: cannot be opened: .*symbolic link"),
    "weights are empty": (cut(SINGLE, 0), "expected a whole safetensors file"),
    "header cut": (cut(SINGLE, 20), "expected a whole safetensors file"),
    "data cut": (cut(SINGLE, 700), "expected a whole safetensors file"),
    "header lies": (put(SINGLE, struct.pack("<Q", 2**63)), "expected a whole safetensors file"),
    "header is no JSON": (put(SINGLE, struct.pack("<Q", 4) + b"abcd"), "expected a whole"),
}
BAD_SHARDED = {
    "index is no JSON": (put(INDEX, "{"), "index.json: expected valid JSON"),
    "no weight_map": (put(INDEX, "{}"), "expected weight_map, .*found NoneType"),
    "empty weight_map": (put(INDEX, '{"weight_map": {}}'), "expected weight_map"),
    "shard is a number": (
        put(INDEX, '{"weight_map": {"w": 1}}'),
        r"weight_map\['w'\]: .*found '1'",
    ),
    "shard is outside": (put(INDEX, '{"weight_map": {"w": "../x"}}'), "found '../x'"),
    "shard is absolute": (put(INDEX, '{"weight_map": {"w": "/x"}}'), "found '/x'"),
    "shard has a null": (put(INDEX, '{"weight_map": {"w": "a\\u0000"}}'), "expected a file name"),
    "shard is absent": (
        gone(SHARDS[1]),
        f"{SHARDS[1]}: expected a safetensors file, found nothing",
    ),
    "shard is cut": (cut(SHARDS[0], 100), f"{SHARDS[0]}: expected a whole safetensors file"),
    "tensor is absent": (
        put(SHARDS[1], save({"else": values(2)})),
        rf"{SHARDS[1]}: expected tensor 'model.wide', as {INDEX} says",
    ),
    "tensor is twice": (
        put(SHARDS[1], save({"model.norm.weight": values(2)})),
        rf"'model.norm.weight' is in {SHARDS[0]} too",
    ),
}


def check_bad(folder, change, message):
    change(folder)
    with pytest.raises(SourceError, match=message) as caught:
        HfFolder.open(str(folder))
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("case", BAD_SINGLE)
def test_bad_single(tmp_path, case):
    check_bad(write(tmp_path / "model"), *BAD_SINGLE[case])


@pytest.mark.parametrize("case", BAD_SHARDED)
def test_bad_sharded(tmp_path, case):
    check_bad(write(tmp_path / "model", shards=SHARDS), *BAD_SHARDED[case])


@pytest.mark.parametrize(
    "source",
    [
        "/no/such/folder",
        "./models/none",
        "a/b/c",
        "",
        "owner/na me",
        "a\0b",
        "x" * 5000,
        "owner/ü@\n",
    ],
)
def test_neither_folder_nor_hub_id(source):
    with pytest.raises(SourceError) as caught:
        HfFolder.open(source)
    assert str(caught.value).isprintable()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "loop"):
        with pytest.raises(SourceError, match=r"expected a model folder or a hub id"):
            HfFolder.open(str(tmp_path / name))


HEADER = 8 + struct.unpack("<Q", save(TENSORS)[:8])[0]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), max_size=4))
def test_any_flipped_bytes(tmp_path, flips):
    folder = tmp_path / "flipped"
    if not folder.exists():
        write(folder)
    data = bytearray(save(TENSORS))
    for at, value in flips:
        data[at] = value
    (folder / SINGLE).write_bytes(data)
    try:
        with HfFolder.open(str(folder)) as model:
            for name in model.names:
                model.shape(name)
    except SourceError as error:
        assert str(error).isprintable()


# The hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache, *, shards=None, revision="main"):
    """Lay a model out as huggingface_hub caches it: blobs, and snapshots of links to them."""
    repo = cache / "models--owner--name"
    for name in ("refs", "blobs"):
        (repo / name).mkdir(parents=True)
    (repo / "refs" / revision).write_text(COMMIT)
    snapshot = write(repo / "snapshots" / COMMIT, shards=shards)
    for path in list(snapshot.iterdir()):
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_cached_hub_id_in_a_fresh_process(tmp_path, variable):
    snapshot = cached(tmp_path / "hub", shards=SHARDS)
    values = {"HF_HOME": tmp_path, "HF_HUB_CACHE": tmp_path / "hub"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    environment = kept | {variable: str(values[variable]), "HF_HUB_OFFLINE": "1"}
    code = "from pytest_aprt.sources.hf import HfFolder; print(HfFolder.open('owner/name').path)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == str(snapshot), done.stderr


@pytest.mark.parametrize("shards", [None, SHARDS], ids=["single", "sharded"])
def test_cached_hub_id(offline, shards):
    snapshot = cached(offline, shards=shards)
    with HfFolder.open("owner/name") as model:
        assert model.path == snapshot and model.source == "owner/name"
        assert torch.equal(model.tensor("model.norm.weight"), TENSORS["model.norm.weight"])
    with HfFolder.open(f"owner/name@{COMMIT}") as model:
        assert model.path == snapshot


def test_cached_revision(offline):
    snapshot = cached(offline, revision="v1.0")
    with HfFolder.open("owner/name@v1.0") as model:
        assert model.path == snapshot
    with pytest.raises(SourceError, match="owner/name: no such folder, and not in the hub's cache"):
        HfFolder.open("owner/name")


def test_cached_in_part(offline):
    """What transformers fetched file by file is enough, whatever else the repository lists."""
    snapshot = cached(offline)
    trees = snapshot.parents[1] / "trees"
    trees.mkdir()
    entry = {"size": 1, "blob_id": "x"}
    listing = {name: entry for name in ("config.json", SINGLE, "tokenizer.json", "merges.txt")}
    (trees / f"{COMMIT}.json").write_text(json.dumps(listing))
    with HfFolder.open("owner/name") as model:
        assert model.path == snapshot


def test_cached_without_a_shard(offline):
    snapshot = cached(offline, shards=SHARDS)
    (snapshot / SHARDS[1]).unlink()
    with pytest.raises(SourceError, match=f"{SHARDS[1]}: expected a safetensors file"):
        HfFolder.open("owner/name")


def test_not_cached_while_offline(offline):
    with pytest.raises(SourceError, match=r"HF_HUB_OFFLINE is set: unset it, .*hf download owner"):
        HfFolder.open("owner/name")


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    write(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    with HfFolder.open("owner/name") as model:
        assert str(model.path) == "owner/name"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub.GatedRepoError, "is gated: accept its terms"),
        (hub.RepositoryNotFoundError, "the hub has none of that id"),
        (hub.RevisionNotFoundError, "no revision 'v2'"),
        (hub.LocalEntryNotFoundError, "while the hub cannot be reached: connect"),
        (hub.HFValidationError, "no valid hub id"),
        (ConnectionResetError, "cannot be fetched from the hub: ConnectionResetError"),
        (RuntimeError, "cannot be fetched from the hub: RuntimeError"),
    ],
)
def test_what_the_hub_refuses(offline, monkeypatch, error, message):
    def refuse(*args, **kwargs):
        raise error.__new__(error)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(SourceError, match=message) as caught:
        HfFolder.open("owner/name@v2")
    assert str(caught.value).startswith("owner/name@v2: ")
    assert str(caught.value).isprintable()


def test_fetches_shards_that_the_index_names(offline, monkeypatch, tmp_path):
    """An index may name its shards as it likes; these are fetched in a second step."""
    names = ("model_00001-of-00002.safetensors", "part-b.safetensors")
    remote = write(tmp_path / "remote", shards=names)
    asked = []

    def fetch(repo, *, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        target = tmp_path / "fetched"
        target.mkdir(exist_ok=True)
        for name in allow_patterns:
            if (remote / name).exists():
                (target / name).write_bytes((remote / name).read_bytes())
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with HfFolder.open("owner/name@v1") as model:
        assert set(model.names) == set(TENSORS)
    assert [each[:2] for each in asked] == [("owner/name", "v1")] * 2
    assert asked[1][2] == sorted(names)


def test_the_hash_of_large_files_is_remembered_until_they_change(tmp_path, monkeypatch):
    from pytest_aprt.sources import _files

    monkeypatch.setattr(_files, "_REMEMBERED", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a" * 100)
    first = _files.sha256_of([file])
    assert first == hashlib.sha256(b"a" * 100).hexdigest()
    (kept,) = (tmp_path / "cache" / "pytest-aprt").iterdir()
    kept.write_text("0" * 64)
    assert _files.sha256_of([file]) == "0" * 64  # read from there
    file.write_bytes(b"b" * 100)
    assert _files.sha256_of([file]) == hashlib.sha256(b"b" * 100).hexdigest()
    kept.write_text("no hash")
    os.utime(file, ns=(1, 1))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert _files.sha256_of([file]) == hashlib.sha256(b"b" * 100).hexdigest()
