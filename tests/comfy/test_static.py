"""What can be told about the nodes and workflows without ComfyUI: from the sources and the JSON alone."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import get_args

import pytest
from sparse_forcing_pack.sparse_attn.config import (
    AttentionConfig,
    Backend,
    Keep,
    Mode,
    PageBits,
    Positions,
    Router,
)

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))

# Saved workflows refer to these names for ever: a new one may be added, none may change.
FROZEN = {
    "SparseForcingModelLoader": {
        "inputs": ["model_name", "weights", "weight_dtype", "lora_name"],
        "outputs": ["MODEL"],
    },
    "SparseForcingWorldModel": {"inputs": [], "outputs": ["MODEL", "CLIP", "VAE"]},
    "SparseForcingApply": {
        "inputs": [
            "model",
            "mode",
            "window_frames",
            "persistent_frames",
            "topk",
            "sink_frames",
            "positions",
            "block_tokens",
            "backend",
            "dense_first_chunk",
            "sink_ema",
            "fast_pass",
            "keep",
            "page_bits",
            "router",
            "offload_pages",
            "shortcuts",
        ],
        "outputs": ["MODEL"],
    },
    "SparseForcingSampler": {"inputs": ["chunk_frames", "first_steps"], "outputs": ["SAMPLER"]},
    "SparseForcingStreamVideo": {
        "inputs": [
            "model",
            "positive",
            "vae",
            "width",
            "height",
            "seconds",
            "seed",
            "steps",
            "cfg",
            "chunk_frames",
            "fps",
            "filename_prefix",
            "negative",
            "sigmas",
            "first_steps",
            "clip",
            "on_prompt_change",
            "session",
            "autosave_chunks",
            "image",
            "latent",
        ],
        "outputs": ["VIDEO", "LATENT", "SESSION"],
    },
    "SaveSparseForcingSession": {"inputs": ["session", "filename_prefix"], "outputs": ["SESSION"]},
    "LoadSparseForcingSession": {"inputs": ["session_name"], "outputs": ["SESSION"]},
    "SparseForcingMemoryMap": {"inputs": ["session", "images", "layer", "head"], "outputs": ["IMAGE"]},
    "SparseForcingPreset": {"inputs": ["model", "preset"], "outputs": ["MODEL"]},
    "SparseForcingEstimate": {
        "inputs": [
            "model",
            "width",
            "height",
            "seconds",
            "chunk_frames",
            "steps",
            "cfg",
            "batch",
            "budget_gb",
            "vae",
            "measure",
        ],
        "outputs": ["MODEL", "text", "IMAGE"],
    },
    "SparseForcingBenchmark": {
        "inputs": ["model", "width", "height", "chunks", "chunk_frames", "steps", "positive"],
        "outputs": ["text", "IMAGE"],
    },
    "SparseForcingPromptTimeline": {"inputs": ["clip", "text"], "outputs": ["CONDITIONING"]},
}
SOCKETS = {
    "Model",
    "Conditioning",
    "Vae",
    "Clip",
    "Sigmas",
    "Latent",
    "Video",
    "Image",
    "Sampler",
    "Noise",
    "Guider",
    "SESSION",
}


def attribute_path(node: ast.expr) -> str:
    """`io.Int.Input` of the call's function, or ''."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def calls(tree: ast.AST, kind: str) -> list[ast.Call]:
    """Calls of `io`, or of the pack's own socket type, whose name ends in `kind`."""
    found = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    return [
        n
        for n in found
        if attribute_path(n.func).startswith(("io.", "SESSION.")) and attribute_path(n.func).endswith(kind)
    ]


def node_classes() -> dict[str, ast.ClassDef]:
    """Node id -> class, for every class that inherits io.ComfyNode directly with a literal id."""
    nodes = {}
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for cls in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(cls, ast.ClassDef) and any(attribute_path(b) == "io.ComfyNode" for b in cls.bases):
                (schema,) = calls(cls, "Schema")
                node_id = keyword(schema, "node_id")
                assert isinstance(node_id, ast.Constant), f"{cls.name} needs a literal node_id"
                nodes[node_id.value] = cls
    return nodes


NODES = node_classes()


def inputs_of(node_id: str) -> list[ast.Call]:
    return calls(NODES[node_id], ".Input")


def input_name(call: ast.Call) -> str:
    return ast.literal_eval(call.args[0])


def test_node_ids_inputs_and_outputs_are_frozen():
    found = {
        node_id: {
            "inputs": [input_name(i) for i in inputs_of(node_id)],
            "outputs": [ast.literal_eval(keyword(o, "display_name")) for o in calls(cls, ".Output")],
        }
        for node_id, cls in NODES.items()
    }
    assert found == FROZEN


@pytest.mark.parametrize("node_id", FROZEN)
def test_everything_on_a_node_is_explained(node_id):
    cls = NODES[node_id]
    (schema,) = calls(cls, "Schema")
    for part in ("display_name", "category", "description", "search_aliases"):
        assert keyword(schema, part) is not None, part
    for port in (*calls(cls, ".Input"), *calls(cls, ".Output")):
        tooltip = keyword(port, "tooltip")
        assert tooltip is not None, ast.unparse(port)
        assert len(ast.literal_eval(tooltip)) > 10
    help_page = (ROOT / "web" / "docs" / node_id / "en.md").read_text(encoding="utf-8")
    for call in inputs_of(node_id):
        assert f"**{input_name(call)}**" in help_page


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("mode", Mode),
        ("positions", Positions),
        ("backend", Backend),
        ("keep", Keep),
        ("page_bits", PageBits),
        ("router", Router),
    ],
)
def test_apply_offers_every_choice_that_there_is(name, choices):
    (call,) = [i for i in inputs_of("SparseForcingApply") if input_name(i) == name]
    assert sorted(ast.literal_eval(keyword(call, "options"))) == sorted(map(str, get_args(choices)))
    assert ast.literal_eval(keyword(call, "default")) == str(getattr(AttentionConfig(), name))


def test_schema_inputs_are_execute_arguments():
    for node_id, cls in NODES.items():
        (execute,) = [f for f in cls.body if isinstance(f, ast.FunctionDef) and f.name == "execute"]
        arguments = [a.arg for a in execute.args.args[1:]]
        if execute.args.kwarg is None:
            assert arguments == [input_name(i) for i in inputs_of(node_id)]
        else:
            assert set(arguments) <= {input_name(i) for i in inputs_of(node_id)}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
class TestWorkflow:
    def test_is_a_flat_export_with_a_thumbnail(self, path):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        assert workflow["version"] == 0.4 and "definitions" not in workflow
        assert path.with_suffix(".jpg").read_bytes()[:3] == b"\xff\xd8\xff"
        ids = [node["id"] for node in workflow["nodes"]]
        assert len(set(ids)) == len(ids) and workflow["last_node_id"] == max(ids)
        assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])

    def test_links_agree_at_both_ends(self, path):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        nodes = {node["id"]: node for node in workflow["nodes"]}
        for link_id, source, out_slot, target, in_slot, kind in workflow["links"]:
            output, socket = nodes[source]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
            assert link_id in output["links"] and socket["link"] == link_id
            assert output["type"] == socket["type"] == kind

    def test_our_nodes_match_their_schemas(self, path):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] not in FROZEN:
                continue
            schema = {input_name(i): attribute_path(i.func).split(".")[-2] for i in inputs_of(node["type"])}
            optional = {input_name(i) for i in inputs_of(node["type"]) if keyword(i, "optional")}
            saved = {i["name"] for i in node["inputs"]}
            assert (
                set(schema) - optional <= saved <= set(schema)
            )  # what is optional may be newer than the workflow
            for socket in node["inputs"]:
                assert ("widget" in socket) == (schema[socket["name"]] not in SOCKETS)
            assert [o["name"] for o in node["outputs"]] == FROZEN[node["type"]]["outputs"]

    def test_equals_its_api_form(self, path):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        api = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
        found = {
            str(n["id"]): as_api(n, workflow["links"])
            for n in workflow["nodes"]
            if n["type"] != "MarkdownNote"
        }
        for node_id, node in api.items():
            inputs = found[node_id]["inputs"]
            assert found[node_id]["class_type"] == node["class_type"]
            # what the API form leaves out is left to the node's default
            assert {k: inputs[k] for k in node["inputs"]} == node["inputs"]
        assert found.keys() == api.keys()


def as_api(node: dict, links: list) -> dict:
    """A node of the front end's form as the API wants it."""
    sources = {link[0]: [str(link[1]), link[2]] for link in links}
    values = iter(node.get("widgets_values", []))
    inputs = {}
    for socket in node["inputs"]:
        if "widget" in socket:
            inputs[socket["name"]] = next(values)
            if socket["name"] in ("seed", "noise_seed"):
                assert next(values) in ("fixed", "randomize", "increment", "decrement")
        elif socket["link"] is not None:
            inputs[socket["name"]] = sources[socket["link"]]
    assert next(values, None) is None, f"{node['type']} has more values than widgets"
    return {"class_type": node["type"], "inputs": inputs}


BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
CORE = {"CLIPTextEncode": {"clip": "Clip", "text": "String"}}  # the host's own nodes in blueprints
ENDS = {-10: "inputs", -20: "outputs"}  # what a link of a subgraph calls the subgraph's own sockets


def widget_allows(call: ast.Call, value: object) -> bool:
    """Whether a saved value fits the schema's input."""
    given = {
        name: ast.literal_eval(found)
        for name in ("min", "max", "options")
        if (found := keyword(call, name)) is not None
    }
    kind = attribute_path(call.func).split(".")[-2]
    if kind == "Combo":
        return value in given["options"]
    types = {"Int": int, "Float": (int, float), "Boolean": bool, "String": str}
    fits = isinstance(value, types[kind]) and isinstance(value, bool) == (kind == "Boolean")
    return fits and ("min" not in given or given["min"] <= value <= given["max"])


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
class TestBlueprint:
    @pytest.fixture
    def host(self, path) -> dict:
        """The one node that a blueprint puts into a graph."""
        (node,) = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        return node

    @pytest.fixture
    def graph(self, path) -> dict:
        (subgraph,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
        return subgraph

    def test_is_shipped(self, path):
        ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
        assert f"{path.parent.name}/" not in ignored
        assert '"subgraphs/*"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    def test_is_one_node_with_the_subgraphs_sockets(self, path, host, graph):
        assert host["type"] == graph["id"] and host["title"] == graph["name"] == path.stem
        assert "(Sparse Forcing" in path.stem and graph["category"] and len(graph["description"]) > 40
        for side in ENDS.values():
            assert [(s["name"], s["type"]) for s in host[side]] == [
                (s["name"], s["type"]) for s in graph[side]
            ]
        assert not any(slot.get("link") or slot.get("links") for slot in (*host["inputs"], *host["outputs"]))

    def test_links_agree_at_both_ends(self, graph):
        nodes = {node["id"]: node for node in graph["nodes"]}
        found = []
        for link in graph["links"]:
            origin, target = link["origin_id"], link["target_id"]
            source = (graph["inputs"] if origin in ENDS else nodes[origin]["outputs"])[link["origin_slot"]]
            socket = (graph["outputs"] if target in ENDS else nodes[target]["inputs"])[link["target_slot"]]
            assert link["id"] in (source["linkIds"] if origin in ENDS else source["links"])
            assert link["id"] in socket["linkIds"] if target in ENDS else link["id"] == socket["link"]
            assert source["type"] == socket["type"] == link["type"]
            found.append(link["id"])
        assert len(set(found)) == len(found) and graph["state"]["lastLinkId"] == max(found)
        assert graph["state"]["lastNodeId"] == max(nodes) and len(nodes) == len(graph["nodes"])
        named = [i for node in nodes.values() for i in [socket["link"] for socket in node["inputs"]] if i]
        named += [i for side in ENDS.values() for slot in graph[side] for i in slot["linkIds"]]
        assert set(named) == set(found)

    def test_nodes_and_their_values_match_the_schemas(self, graph):
        links = [[link["id"], link["origin_id"], link["origin_slot"]] for link in graph["links"]]
        for node in graph["nodes"]:
            values = as_api(node, links)["inputs"]
            names = {socket["name"] for socket in node["inputs"]}
            if node["type"] in CORE:
                assert names == set(CORE[node["type"]]) == set(values)
                continue
            calls_of = {input_name(call): call for call in inputs_of(node["type"])}
            required = {name for name, call in calls_of.items() if not keyword(call, "optional")}
            assert required <= set(values) and names <= set(calls_of)
            assert [o["name"] for o in node["outputs"]] == FROZEN[node["type"]]["outputs"]
            for socket in node["inputs"]:
                if "widget" in socket:
                    assert widget_allows(calls_of[socket["name"]], values[socket["name"]]), socket["name"]
