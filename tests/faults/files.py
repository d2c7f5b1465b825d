"""GGUF files with something changed in them: metadata or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np

from pytest_aprt.sources.gguf import GgufFile

GONE = object()
"""A value that takes its key or tensor away."""


def rewritten(
    source: Path,
    target: Path,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """Copy a GGUF with other metadata and other tensors.

    ``metadata`` maps keys to values or GONE; ``tensors`` maps names to float32 arrays (matrices
    are stored as Q4_0, vectors as F32), to ``(raw, type)`` or to GONE.
    """
    metadata, tensors = dict(metadata or {}), dict(tensors or {})
    with GgufFile.open(source) as file:
        writer = gguf.GGUFWriter(target, file.architecture)
        for key in file.metadata:
            value = metadata.pop(key, file.metadata[key])
            if key != "general.architecture" and value is not GONE:
                add(writer, key, value)
        for key, value in metadata.items():
            if value is not GONE:
                add(writer, key, value)
        for name, info in file.tensors.items():
            value = tensors.pop(name, None)
            if value is GONE:
                continue
            if value is None:
                value = file.raw(name).copy(), info.type
            write(writer, name, value, info)
        for name, value in tensors.items():
            if value is not GONE:
                write(writer, name, value, None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target


def write(writer, name: str, value, info) -> None:
    if isinstance(value, tuple):
        raw, kind = value
        kind = gguf.GGMLQuantizationType[kind]
        shape = info.shape if info is not None else None
        if kind.name in ("F32", "F16"):
            dtype = np.float32 if kind.name == "F32" else np.float16
            writer.add_tensor(name, np.ascontiguousarray(raw).view(dtype).reshape(shape))
        else:
            writer.add_tensor(name, np.ascontiguousarray(raw), raw_dtype=kind)
        return
    value = np.ascontiguousarray(value, np.float32)
    if value.ndim == 1:
        writer.add_tensor(name, value)
        return
    kind = gguf.GGMLQuantizationType.Q4_0
    with np.errstate(all="ignore"):  # some are not finite on purpose
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)


def add(writer, key: str, value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))
