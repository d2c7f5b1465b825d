"""The table of stages, the names that users type, and the graph of points."""

from __future__ import annotations

import pytest

from pytest_aprt.architectures import ARCHITECTURES
from pytest_aprt.errors import SettingsError
from pytest_aprt.facts import Facts, RopeScaling
from pytest_aprt.quants import QUANT_TYPES
from pytest_aprt.stages import (
    ALIASES,
    STAGES,
    Point,
    StageGraph,
    point_id,
    stage_named,
    stages_named,
)

FACTS = Facts(
    layers=4, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, vocab=1024,
    context=2048, eps=1e-6, rope_theta=1e6, rope_scaling=RopeScaling(), windows=(None,) * 4,
    tied_embeddings=False, activation="silu",
)  # fmt: skip
SPECIAL_PARENTS = {"tokens", "layer_input", "qkv"}


@pytest.fixture
def graph():
    return ARCHITECTURES["qwen2"].graph(4)


# The table


def test_the_order_is_that_of_the_design():
    assert list(STAGES) == [
        "embedding", "attn_norm", "qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope",
        "attn_scores", "attn_softmax", "attention", "attn_out", "post_attn_residual", "ffn_norm",
        "ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "ffn_out", "post_ffn_residual",
        "moe_router", "moe_router_indices", "moe_ffn_out", "final_norm", "lm_head",
    ]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_parents_come_earlier_in_the_table(stage):
    names = list(STAGES)
    earlier = set(names[: names.index(stage.name)])
    assert set(stage.parents) <= earlier | SPECIAL_PARENTS
    assert stage.parents


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_slices_are_axes_or_parts(stage):
    assert set(stage.slices) <= {*stage.axes, "part"}
    assert ("part" in stage.slices) == (stage.shape == ("T", "(nq+2*nkv)*D"))
    assert len(set(stage.axes)) == len(stage.axes)


@pytest.mark.parametrize(
    "stage", [s for s in STAGES.values() if s.needs != "moe"], ids=lambda s: s.name
)
def test_shapes_are_symbols_that_facts_know(stage):
    sizes = FACTS.sizes(tokens=7)
    assert all(sizes[symbol] > 0 for symbol in stage.shape)


def test_sizes_follow_from_the_facts():
    sizes = FACTS.sizes(tokens=7)
    assert (sizes["T"], sizes["H"], sizes["I"], sizes["V"]) == (7, 256, 512, 1024)
    assert (sizes["nq*D"], sizes["nkv*D"], sizes["(nq+2*nkv)*D"]) == (256, 128, 512)
    assert FACTS.qkv_sizes == (256, 128, 128)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_what_a_stage_needs_is_a_field_of_every_architecture(stage):
    if stage.needs is not None:
        assert all(isinstance(getattr(a, stage.needs), bool) for a in ARCHITECTURES.values())
    else:
        assert not stage.name.startswith("moe_")


def test_every_tensor_is_read_by_one_stage():
    read = [name for stage in STAGES.values() for name in stage.tensors]
    assert len(read) == len(set(read))
    for architecture in ARCHITECTURES.values():
        assert {*architecture.layer_tensors, *architecture.model_tensors} <= set(read)


def test_a_quant_bound_is_below_what_a_swapped_tensor_shows():
    assert all(0 < row.bound < 1 and row.bound > row.measured for row in QUANT_TYPES.values())


# Names that users type


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_found_by_its_name(name):
    assert stage_named(name) is STAGES[name]
    assert stage_named(f"  {name.upper()} ") is STAGES[name]


def test_layer_output_is_an_alias():
    assert stage_named("Layer_Output").name == "post_ffn_residual"
    assert not set(ALIASES) & set(STAGES)


@pytest.mark.parametrize("name", ["", " ", "q_rope", "all", "attn-norm", "L00-attn_norm"])
def test_an_unknown_or_empty_name_lists_the_known(name):
    with pytest.raises(SettingsError) as error:
        stage_named(name)
    assert repr(name.strip()) in str(error.value)
    assert all(stage in str(error.value) for stage in STAGES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", list(STAGES)),
        (" ALL ", list(STAGES)),
        ("lm_head", ["lm_head"]),
        ("lm_head, embedding ,attn_norm", ["embedding", "attn_norm", "lm_head"]),
        ("layer_output,post_ffn_residual", ["post_ffn_residual"]),
    ],
)
def test_a_list_is_put_in_computation_order(text, expected):
    assert [stage.name for stage in stages_named(text)] == expected


@pytest.mark.parametrize("text", ["", ",", "attn_norm,", "attn_norm,,lm_head", "all,lm_head", "x"])
def test_a_list_with_an_empty_or_unknown_name_is_an_error(text):
    with pytest.raises(SettingsError, match="expected 'all' or one of embedding, attn_norm"):
        stages_named(text)


# The graph


@pytest.mark.parametrize(
    ("layer", "stage", "expected"),
    [(0, "embedding", "L00-embedding"), (7, "attn_norm", "L07-attn_norm"),
     (127, "ffn_up", "L127-ffn_up"), (None, "lm_head", "lm_head")],
)  # fmt: skip
def test_point_ids(layer, stage, expected):
    assert point_id(layer, stage) == str(Point(layer, stage)) == expected


def test_qwen2_of_4_layers_has_71_points(graph):
    assert len(graph.points) == len(set(map(str, graph.points))) == 71
    assert str(graph.points[0]) == "L00-embedding"
    assert [str(point) for point in graph.points[-3:]] == [
        "L03-post_ffn_residual", "final_norm", "lm_head",
    ]  # fmt: skip
    assert sum(point.stage == "embedding" for point in graph.points) == 1
    assert not any(point.stage.startswith("moe_") for point in graph.points)


def test_order_is_the_place_in_the_points(graph):
    assert [graph.order(point) for point in graph.points] == list(range(71))


def test_every_point_comes_after_its_parents(graph):
    for point in graph.points:
        assert all(graph.order(parent) < graph.order(point) for parent in graph.parents(point))
        assert all(graph.order(above) < graph.order(point) for above in graph.ancestors(point))
        assert set(graph.parents(point)) <= graph.ancestors(point)


@pytest.mark.parametrize(
    ("point", "parents"),
    [
        (Point(0, "embedding"), []),
        (Point(0, "attn_norm"), ["L00-embedding"]),
        (Point(1, "attn_norm"), ["L00-post_ffn_residual"]),
        (Point(2, "q_post_rope"), ["L02-qkv_bias"]),
        (Point(2, "attn_scores"), ["L02-q_post_rope", "L02-k_post_rope"]),
        (Point(2, "attention"), ["L02-attn_softmax", "L02-qkv_bias"]),
        (Point(0, "post_attn_residual"), ["L00-embedding", "L00-attn_out"]),
        (Point(3, "post_ffn_residual"), ["L03-post_attn_residual", "L03-ffn_out"]),
        (Point(None, "final_norm"), ["L03-post_ffn_residual"]),
        (Point(None, "lm_head"), ["final_norm"]),
    ],
)
def test_parents(graph, point, parents):
    assert [str(parent) for parent in graph.parents(point)] == parents


@pytest.mark.parametrize("pair", [("q_post_rope", "k_post_rope"), ("ffn_gate", "ffn_up")])
def test_siblings_are_no_ancestors_of_each_other(graph, pair):
    a, b = (Point(2, name) for name in pair)
    assert a not in graph.ancestors(b)
    assert b not in graph.ancestors(a)


def test_ancestors_reach_through_layers_but_not_downstream(graph):
    above = graph.ancestors(Point(2, "attn_out"))
    assert Point(0, "embedding") in above
    assert Point(1, "ffn_silu") in above
    assert Point(2, "k_post_rope") in above
    assert Point(2, "attn_out") not in above
    assert Point(2, "ffn_norm") not in above
    assert len(graph.ancestors(Point(None, "lm_head"))) == 70


def test_without_biases_rope_reads_the_matmul():
    graph = StageGraph(1, [name for name in STAGES if name != "qkv_bias"])
    assert graph.qkv == "qkv_matmul"
    assert graph.parents(Point(0, "q_post_rope")) == [Point(0, "qkv_matmul")]
    assert graph.parents(Point(0, "attention"))[1] == Point(0, "qkv_matmul")


def test_stages_of_a_layer(graph):
    assert [stage.name for stage in graph.of_layer(None)] == ["final_norm", "lm_head"]
    assert len(graph.of_layer(0)) == 18
    assert len(graph.of_layer(1)) == 17
