"""Tiny .onnx files in the layouts of real detectors and classifiers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STRIDES = (8, 16, 32)


class Graph:
    """Nodes, constants and outputs of a model whose one input is `input` [batch, 3, *size]."""

    def __init__(self, size, batch=1):
        self.nodes, self.constants, self.outputs = [], [], []
        self.shape = [batch, 3, *size]
        self.names = 0

    def constant(self, array):
        self.names += 1
        self.constants.append(numpy_helper.from_array(np.asarray(array), f"c{self.names}"))
        return f"c{self.names}"

    def add(self, kind, *inputs, name=None, **attributes):
        self.names += 1
        name = name or f"n{self.names}"
        inputs = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def output(self, value, name, rank=2):
        """Names a value, which any input leaves as it is, as an output."""
        self.add("Identity", value, name=name)
        shape = [f"{name}_{axis}" for axis in range(rank)]
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def save(self, path: Path) -> str:
        source = helper.make_tensor_value_info("input", TensorProto.FLOAT, self.shape)
        graph = helper.make_graph(self.nodes, "g", [source], self.outputs, self.constants)
        opset = helper.make_opsetid("", 17)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return str(path)


def fixed_outputs(path, size, outputs: dict[str, np.ndarray]) -> str:
    """A model that gives these arrays whatever the picture."""
    graph = Graph(size)
    zero = graph.add("Mul", graph.add("ReduceMax", "input", keepdims=0), np.float32(0))
    for name, array in outputs.items():
        graph.output(graph.add("Add", zero, array.astype(np.float32)), name, array.ndim)
    return graph.save(path)


def red_square_detector(path, stride, box, points, size=("h", "w"), batched=False) -> str:
    """InsightFace's layout: a cell of `stride` that is red to the edges is a face.

    Args:
      box: distances to left, top, right, bottom in strides; points: ten shifts in strides.
    """
    graph = Graph(size)
    # What the picture was before (x - 127.5) / 128, red less green, of 255.
    weights = np.array([1, -1, 0], np.float32).reshape(1, 3, 1, 1) * 128 / 255
    red = graph.add("Conv", "input", weights)
    rows = {}
    for level in STRIDES:
        pool = dict(kernel_shape=[level, level], strides=[level, level])
        mean = graph.add("AveragePool", red, **pool)
        score = graph.add("Clip", mean, np.float32(0), np.float32(1))
        score = graph.add("Mul", score, np.float32(level == stride))
        flat = graph.add("Reshape", score, np.array([-1, 1]))
        # The first of the two proposals of a cell is the face, the second never.
        pair = graph.add("Concat", flat, graph.add("Mul", flat, np.float32(0)), axis=1)
        rows[level] = graph.add("Reshape", pair, np.array([-1, 1]))
    for name, values in (("score", None), ("bbox", box), ("kps", points)):
        for level in STRIDES:
            found = rows[level]
            if values is not None:
                zero = graph.add("Mul", found, np.float32(0))
                found = graph.add("Add", zero, np.array([values], np.float32))
            if batched:
                found = graph.add("Unsqueeze", found, np.array([0]))
            graph.output(found, f"{name}_{level}", 3 if batched else 2)
    return graph.save(path)


def mean_colour_classifier(path, size, batch="b", numbers=40) -> str:
    """A classifier whose number i is i / 100 of the mean of channel i % 3."""
    graph = Graph(size, batch)
    mean = graph.add("ReduceMean", "input", axes=[2, 3], keepdims=0)
    weights = np.zeros((3, numbers), np.float32)
    for i in range(numbers):
        weights[i % 3, i] = i / 100
    graph.output(graph.add("MatMul", mean, weights), "numbers")
    return graph.save(path)
