"""Runs llama.cpp on one prompt and writes what its graph computes; a process of its own.

Reads a request from standard input, as one line of JSON: ``model`` (path), ``parameters``
(fields of llama.cpp's model and context parameters), ``batches`` (lists of token ids that are
decoded one after the other in one context) and ``observe`` (without it only the logits come back).
Writes frames to standard output: a line of JSON, then as many bytes as it says. A crash in C++ ends
this process and not pytest's.

Tensors are told apart by their operation and by the weight that they consume, since the names and
numbers of nodes differ from one revision of llama.cpp to the next.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from typing import Any, BinaryIO, NamedTuple

import llama_cpp
import numpy as np
from llama_cpp import _ggml
from numpy.typing import NDArray

_MAX_DIMS, _MAX_SRC, _OP_PARAMS, _MAX_NAME = 4, 10, 64, 64  # GGML_MAX_* of ggml.h


class _Tensor(ctypes.Structure):
    """The beginning of ``struct ggml_tensor`` (ggml.h); ``_check_layout`` tests that it fits."""


_TensorPointer = ctypes.POINTER(_Tensor)
_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * _MAX_DIMS),
    ("nb", ctypes.c_size_t * _MAX_DIMS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * (_OP_PARAMS // 4)),
    ("flags", ctypes.c_int32),
    ("src", _TensorPointer * _MAX_SRC),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * _MAX_NAME),
]

_DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # ggml_type

_VIEWS = frozenset({"RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE", "CONT"})
"""Operations that change no value."""

_CHAIN = 16
"""Steps from a tensor to the projection that it comes from, at most; there are four."""


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(_ggml.libggml, name)
    function.restype, function.argtypes = restype, argtypes
    return function


_get_name = _function("ggml_get_name", ctypes.c_void_p, _TensorPointer)
_op_name = _function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
_nbytes = _function("ggml_nbytes", ctypes.c_size_t, _TensorPointer)
_read_bytes = _function(
    "ggml_backend_tensor_get", None,
    _TensorPointer, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t,
)  # fmt: skip


class Node(NamedTuple):
    """What a tensor of the graph is: a stage or a part of one, and where in it the value lies.

    ``source`` is the operand that holds the value, or None for the result itself.
    """

    layer: int | None
    stage: str
    part: int | None = None
    source: int | None = None


_MATMULS = {
    "attn_q": ("qkv_matmul", 0),
    "attn_k": ("qkv_matmul", 1),
    "attn_v": ("qkv_matmul", 2),
    "attn_output": ("attn_out", None),
    "ffn_gate": ("ffn_gate", None),
    "ffn_up": ("ffn_up", None),
    "ffn_down": ("ffn_out", None),
    "output": ("lm_head", None),
    "token_embd": ("lm_head", None),  # tied
}
_CONSUMED = {"attn_output": "attention", "ffn_down": "ffn_swigl"}  # by these matmuls
_BIASES = {"attn_q": 0, "attn_k": 1, "attn_v": 2}
_NORMS = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "output_norm": "final_norm"}
_ROTATED = {"attn_q": "q_post_rope", "attn_k": "k_post_rope"}
_SUMMED = {"attn_output": "post_attn_residual", "ffn_down": "post_ffn_residual"}


class _Weight(NamedTuple):
    layer: int | None
    name: str  # without the block and the ending: attn_q
    kind: str  # weight or bias


def _op(tensor: Any) -> str:
    name: bytes = _op_name(tensor.contents.op)
    return name.decode()


def _source(tensor: Any, index: int) -> Any | None:
    source = tensor.contents.src[index]
    return source or None


def _weight(tensor: Any | None) -> _Weight | None:
    """Return which of the file's tensors this is, if it is one."""
    if tensor is None or _op(tensor) != "NONE":
        return None
    name = tensor.contents.name.decode()
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return None
    return _Weight(None if found[1] is None else int(found[1]), found[2], found[3])


def _seen_through(tensor: Any | None, operations: frozenset[str] = _VIEWS) -> Any | None:
    """Return the tensor of which this is a view."""
    for _ in range(_CHAIN):
        if tensor is None or _op(tensor) not in operations:
            return tensor
        tensor = _source(tensor, 0)
    return tensor


def _projection(tensor: Any | None) -> _Weight | None:
    """Return the weight of the matmul that a tensor comes from, by way of bias, norm and views."""
    for _ in range(_CHAIN):
        if tensor is None:
            return None
        if _op(tensor) == "MUL_MAT":
            return _weight(_source(tensor, 0))
        tensor = _source(tensor, 0)
    return None


def _is_scores(tensor: Any | None) -> _Weight | None:
    """Return Q's weight if this is the product of keys and rotated queries."""
    if tensor is None or _op(tensor) != "MUL_MAT" or _weight(_source(tensor, 0)):
        return None
    queries = _seen_through(_source(tensor, 1))
    if queries is None or _op(queries) != "ROPE":
        return None
    return _projection(queries)


def nodes_of(tensor: Any) -> list[Node]:
    """Return the stages that can be read once this tensor is computed."""
    operation, operands = _op(tensor), [_source(tensor, 0), _source(tensor, 1)]
    weights = [weight for operand in operands if (weight := _weight(operand))]
    weight = weights[0] if weights else None
    if operation == "GET_ROWS" and weight and weight.name == "token_embd":
        return [Node(0, "embedding")]
    if operation == "MUL_MAT" and weight and weight.name in _MATMULS:
        stage, part = _MATMULS[weight.name]
        layer = None if stage == "lm_head" else weight.layer
        read = _CONSUMED.get(weight.name)
        before = [Node(layer, read, source=1)] if read else []
        return [*before, Node(layer, stage, part)]
    if operation == "MUL_MAT" and (queries := _is_scores(tensor)):
        return [Node(queries.layer, "attn_scores")]
    if operation == "MUL" and weight and weight.name in _NORMS:
        return [Node(weight.layer, _NORMS[weight.name])]
    if operation == "ADD" and weight and weight.name in _BIASES and weight.kind == "bias":
        return [Node(weight.layer, "qkv_bias", _BIASES[weight.name])]
    if operation == "ADD" and not weight:
        for operand in operands:  # llama.cpp picks the rows to put out before the last residual
            product = _seen_through(operand, _VIEWS | {"GET_ROWS"})
            if product is not None and _op(product) == "MUL_MAT":
                found = _weight(_source(product, 0))
                if found and found.name in _SUMMED:
                    return [Node(found.layer, _SUMMED[found.name])]
    if operation == "ROPE" and (found := _projection(tensor)) and found.name in _ROTATED:
        return [Node(found.layer, _ROTATED[found.name])]
    if operation == "SOFT_MAX" and (queries := _is_scores(_seen_through(operands[0]))):
        return [Node(queries.layer, "attn_softmax")]
    if operation == "UNARY" and (found := _projection(operands[0])) and found.name == "ffn_gate":
        return [Node(found.layer, "ffn_silu")]
    return []


def values_of(tensor: Any) -> NDArray[np.float32]:
    """Return a tensor's values: four axes, in numpy's order, which is the reverse of ggml's."""
    fields = tensor.contents
    if fields.type not in _DTYPES:
        raise TypeError(
            f"{fields.name.decode()} is of ggml type {fields.type}, expected F32 or F16"
        )
    raw = np.empty(_nbytes(tensor), np.uint8)
    _read_bytes(tensor, raw.ctypes.data, 0, raw.size)
    shape, strides = tuple(fields.ne)[::-1], tuple(fields.nb)[::-1]
    values: NDArray[Any] = np.ndarray(shape, _DTYPES[fields.type], raw, strides=strides)
    return np.ascontiguousarray(values, np.float32)


def _scale(tensor: Any) -> float:
    """Return what SOFT_MAX multiplies the scores by: the first of its parameters, a float."""
    return ctypes.c_float.from_buffer(tensor.contents.op_params).value


class Observer:
    """llama.cpp's evaluation callback: sends every tensor that is a stage as a frame."""

    def __init__(self, out: Frames) -> None:
        self.batch = 0
        self.error: BaseException | None = None
        self._out = out
        self._nodes: list[Node] = []
        self._checked = False
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._called)

    def _called(self, address: int, ask: bool, _: int) -> bool:
        """Say whether a tensor is wanted (``ask``), or take its value; False stops the run.

        No exception may leave a callback.
        """
        if self.error is not None:
            return ask  # go on to where the answer stops the run
        try:
            tensor = ctypes.cast(address, _TensorPointer)
            if ask:
                if not self._checked:
                    _check_layout(tensor)
                    self._checked = True
                self._nodes = nodes_of(tensor)
                return bool(self._nodes)
            for node in self._nodes:
                self._send(tensor, node)
            return True
        except BaseException as error:
            self.error = error
            return ask

    def _send(self, tensor: Any, node: Node) -> None:
        holder = tensor if node.source is None else _source(tensor, node.source)
        values = values_of(holder)
        if node.stage == "lm_head":
            values = values[0, 0, -1]
        about: dict[str, Any] = {"batch": self.batch, "layer": node.layer, "stage": node.stage}
        about["part"] = node.part
        if node.stage == "attn_softmax":
            about["scale"] = _scale(tensor)
        self._out.send(about, values)


def _check_layout(tensor: Any) -> None:
    """Refuse to read tensors whose struct is another than the one declared here."""
    offset = _get_name(tensor) - ctypes.addressof(tensor.contents)
    if offset != _Tensor.name.offset:
        raise RuntimeError(
            f"struct ggml_tensor of llama-cpp-python {llama_cpp.__version__} has its name at byte "
            f"{offset}, expected {_Tensor.name.offset}; use another version"
        )


class Frames:
    """Writes frames: a line of JSON, then the bytes of an array."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def send(self, about: dict[str, Any], values: NDArray[Any] | None = None) -> None:
        """Write one frame and flush it."""
        if values is not None:
            about = {**about, "shape": list(values.shape)}
        self._stream.write(json.dumps(about).encode() + b"\n")
        if values is not None:
            self._stream.write(np.ascontiguousarray(values, "<f4").tobytes())
        self._stream.flush()


class EngineFault(Exception):
    """llama.cpp refuses what it was asked; the text says why."""


class Log:
    """Keeps what llama.cpp says of errors and warnings."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._callback = llama_cpp.llama_log_callback(self._called)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _called(self, level: int, text: bytes, _: Any) -> None:
        if level in (3, 4):  # GGML_LOG_LEVEL_WARN and _ERROR of ggml.h
            self.lines.append(" ".join(text.decode(errors="replace").split()))

    @property
    def last(self) -> str:
        """The first of the last errors: what follows it repeats it."""
        errors = [line for line in self.lines if "error" in line.lower() or "fail" in line.lower()]
        return (errors or self.lines or ["it does not say why"])[0]


def run(request: dict[str, Any], out: Frames, log: Log) -> None:
    """Load the model, decode the batches, and send every frame.

    Raises:
        EngineFault: llama.cpp does not load the file or does not run the prompt.
    """
    llama_cpp.llama_backend_init()
    model_parameters = llama_cpp.llama_model_default_params()
    parameters = llama_cpp.llama_context_default_params()
    batches: list[list[int]] = request["batches"]
    parameters.n_ctx, parameters.n_seq_max = sum(map(len, batches)), 1
    # One graph for a prompt: a smaller batch would compute it in pieces.
    parameters.n_batch = parameters.n_ubatch = max(map(len, batches))
    _set(request["parameters"], model_parameters, parameters)
    model = llama_cpp.llama_model_load_from_file(os.fsencode(request["model"]), model_parameters)
    if not model:
        raise EngineFault(f"it does not load {request['model']}: {log.last}")
    observer = Observer(out)
    if request["observe"]:
        parameters.cb_eval = observer.callback
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise EngineFault(f"it makes no context: {log.last}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    start = 0
    for index, tokens in enumerate(batches):
        observer.batch = index
        code = _decode(context, tokens, start)
        if observer.error is not None:
            raise observer.error
        if code:
            raise EngineFault(f"llama_decode returned {code}: {log.last}")
        last = llama_cpp.llama_get_logits_ith(context, len(tokens) - 1)
        logits = np.ctypeslib.as_array(last, shape=(vocabulary,))
        out.send({"batch": index, "logits": True}, logits)
        start += len(tokens)
    out.send({"end": True, "about": _about()})
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


def _decode(context: Any, tokens: list[int], start: int) -> int:
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = 1  # else the last layer goes on with the last token alone
        return int(llama_cpp.llama_decode(context, batch))
    finally:
        llama_cpp.llama_batch_free(batch)


def _set(values: dict[str, Any], *structs: Any) -> None:
    """Set each value in the struct that has a plain field of its name."""
    fields = {
        field[0]: struct
        for struct in structs
        for field in struct._fields_
        if issubclass(field[1], ctypes._SimpleCData) and field[1] is not ctypes.c_void_p
    }
    for name, value in values.items():
        if name not in fields:
            raise EngineFault(f"it has no parameter {name!r}: expected {', '.join(sorted(fields))}")
        kind = type(getattr(fields[name], name))
        try:
            setattr(fields[name], name, value)
        except TypeError as error:
            raise EngineFault(
                f"its parameter {name} cannot be {value!r}: expected {kind.__name__}"
            ) from error


def _about() -> dict[str, str]:
    system: bytes = llama_cpp.llama_print_system_info()
    ggml = _function("ggml_version", ctypes.c_char_p)
    commit = _function("ggml_commit", ctypes.c_char_p)
    return {
        "llama-cpp-python": llama_cpp.__version__,
        "ggml": f"{ggml().decode()} ({commit().decode()})",
        "system": system.decode().strip(),
    }


def main() -> int:
    """Answer one request; what is printed by anyone else goes to standard error."""
    out = Frames(_own_stdout())
    log = Log()
    try:
        run(json.loads(sys.stdin.readline()), out, log)
    except BrokenPipeError:
        return 0  # whoever asked has what was wanted
    except EngineFault as error:
        out.send({"error": str(error)})
        return 1
    except (RuntimeError, TypeError, AttributeError) as error:
        out.send({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _own_stdout() -> BinaryIO:
    own = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(own, "wb")


if __name__ == "__main__":
    sys.exit(main())
