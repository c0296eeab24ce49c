"""A drawing of a decoder's computation, made from the graph that torch.compile sees of the module.

    TRITON_INTERPRET=1 python packages/bench/benchmarks/draw_decoder.py docs/images/decoder.svg

Every operator in its order, inside the modules that call it, with what flows between and whether it
is memory of its own or a view. Sizes are chosen so that each number stands for one letter.
"""

import argparse
import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tilewright_kernels import use_backend
from tilewright_model import CausalLM, ModelConfig

CONFIG = ModelConfig(
    vocab_size=101,
    hidden_size=44,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=10,
    intermediate_size=52,
    max_position_embeddings=64,
)
BATCH, TOKENS = 2, 7
LETTERS = {
    2: "B",
    7: "T",
    14: "B·T",
    6: "H",
    3: "K",
    10: "D",
    12: "H+2K",
    60: "H·D",
    120: "(H+2K)·D",
    44: "C",
    52: "I",
    104: "2I",
    101: "V",
    5: "D/2",
}

PLUMBING = {"getitem", "transpose", "expand", "reshape", "contiguous", "broadcast_shapes"}
"""Nodes that only hand something on; `contiguous` of what is contiguous already does."""

ROW, WIDTH, LEFT, INDENT = 34, 190, 60, 14


@dataclass
class Step:
    """One operator of the drawing."""

    name: str
    module: str
    shape: str
    is_view: bool
    inputs: list[int] = field(default_factory=list)


def graph_of(model: CausalLM, ids: Tensor) -> GraphModule:
    """What the compiler is given of a forward."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with use_backend("triton"), torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(ids)
    return graphs[0]


def steps_of(graph: GraphModule) -> list[Step]:
    """Operators in their order, plumbing left out."""
    steps: list[Step] = []
    made_by: dict[Node, list[int]] = {}
    for node in graph.graph.nodes:
        sources = [i for n in node.all_input_nodes for i in made_by.get(n, [])]
        name = _name(node)
        value = node.meta.get("example_value")
        if node.op == "placeholder" and name == "ids":
            steps.append(Step("input_ids", "", _shape(value), False))
        elif node.op not in ("call_function", "call_method") or name in PLUMBING:
            made_by[node] = sources
            continue
        else:
            is_view = isinstance(_first(value), Tensor) and _first(value)._base is not None
            steps.append(Step(name, _module(node), _shape(value), is_view, sorted(set(sources))))
        made_by[node] = [len(steps) - 1]
    return [step for step in steps if step.module != "rotary"]


def _name(node: Node) -> str:
    if node.op == "placeholder":
        return "ids" if "input_ids" in str(node.target) else "parameter"
    target = getattr(node.target, "__name__", str(node.target))
    return target.removesuffix(".default").removesuffix("_forward").removeprefix("tilewright.")


def _module(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return path.replace("L['self'].", "").replace("L['self']", "")


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) and value else value


def _shape(value: Any) -> str:
    values = value if isinstance(value, tuple | list) else [value]
    tensors = [v for v in values if isinstance(v, Tensor) and v.ndim > 1 and v.numel()]
    shapes = ["[" + ", ".join(LETTERS.get(n, str(n)) for n in v.shape) + "]" for v in tensors]
    return "  ".join(shapes)


def svg(steps: list[Step]) -> str:
    """The drawing."""
    height = ROW * (len(steps) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 {height}" '
        f'font-family="sans-serif" font-size="11">'
    ]
    for depth, path in _modules(steps):
        rows = [i for i, s in enumerate(steps) if (s.module + ".").startswith(path + ".")]
        top, bottom = _y(rows[0]) - 17, _y(rows[-1]) + 17
        x, width = LEFT - 24 + INDENT * depth, WIDTH + 48 - 2 * INDENT * depth + 250
        parts.append(
            f'<rect x="{x}" y="{top + 2 * depth}" width="{width}" '
            f'height="{bottom - top - 4 * depth}" rx="6" fill="#4477aa" fill-opacity="0.07" '
            f'stroke="#4477aa" stroke-opacity="0.4"/>'
            f'<text x="{x + width - 6}" y="{top + 13 + 2 * depth}" text-anchor="end" '
            f'fill="#4477aa">{html.escape(_title(path))}</text>'
        )
    for i, step in enumerate(steps):
        for source in step.inputs:
            parts.append(_edge(source, i))
        fill = "#ffffff" if step.is_view else "#ddeeff"
        dash = ' stroke-dasharray="3 2"' if step.is_view else ""
        parts.append(
            f'<rect x="{LEFT + 40}" y="{_y(i) - 10}" width="{WIDTH}" height="20" rx="4" '
            f'fill="{fill}" stroke="#335577"{dash}/>'
            f'<text x="{LEFT + 40 + WIDTH / 2}" y="{_y(i) + 4}" text-anchor="middle">'
            f"{html.escape(_label(step))}</text>"
            f'<text x="{LEFT + 50 + WIDTH}" y="{_y(i) + 4}">{html.escape(step.shape)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _modules(steps: list[Step]) -> list[tuple[int, str]]:
    """Modules with more than one operator, outermost first: (depth, path)."""
    found: dict[str, int] = {}
    for step in steps:
        names = step.module.split(".") if step.module else []
        for end in range(1, len(names) + 1):
            path = ".".join(names[:end])
            if names[end - 1] == "layers":
                continue
            found[path] = found.get(path, 0) + 1
    kept = [path for path, count in found.items() if count > 1]
    return [(sum(path.startswith(other + ".") for other in kept), path) for path in kept]


def _title(path: str) -> str:
    name = path.rpartition(".")[2]
    return f"block {name}" if name.isdigit() else name


def _label(step: Step) -> str:
    """The operator, after the projection's name where that tells more."""
    leaf = step.module.rpartition(".")[2]
    return f"{leaf}: {step.name}" if leaf.endswith("_proj") else step.name


def _y(row: int) -> float:
    return ROW * (row + 0.8)


def _edge(source: int, target: int) -> str:
    x = LEFT + 40 + WIDTH / 2
    if target == source + 1:
        path = f"M {x} {_y(source) + 10} L {x} {_y(target) - 10}"
    else:  # around the operators between, as a residual connection goes
        side = LEFT + 40 - min(34, 8 + 3 * (target - source))
        path = (
            f"M {LEFT + 40} {_y(source)} C {side} {_y(source)} {side} {_y(target)} "
            f"{LEFT + 40} {_y(target)}"
        )
    return f'<path d="{path}" fill="none" stroke="#335577" stroke-opacity="0.7"/>'


def main() -> None:
    """Trace, draw, and print a line an operator."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="SVG file to write")
    options = parser.parse_args()
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    steps = steps_of(graph_of(CausalLM(CONFIG).eval(), ids))
    for step in steps:
        kind = "view" if step.is_view else "new"
        print(f"{step.module or '-':36s} {step.name:24s} {kind:5s} {step.shape}")
    options.out.write_text(svg(steps), encoding="utf-8")


if __name__ == "__main__":
    main()
