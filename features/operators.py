"""The ONNX operators that a bundle's models may use: export refuses others, and so does serving.

Each is a function of its inputs alone, and takes time and memory by their sizes: there is no loop, no branch, no
sequence, no text, no random number, and none reads a file.
"""

from __future__ import annotations

NEWEST_OPSET = 23

# fmt: off
OPERATORS = frozenset((
    "Abs", "Add", "And", "Attention", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "CumSum", "Div", "Equal",
    "Erf", "Exp", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "Greater",
    "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "LayerNormalization", "Less", "LessOrEqual", "Log", "LogSoftmax",
    "MatMul", "Max", "Min", "Mul", "Neg", "Not", "Or", "Pow", "RMSNormalization", "Range", "Reciprocal", "ReduceL2",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Shape", "Sigmoid", "Sign", "Slice",
    "Softmax", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose", "Unsqueeze", "Where",
))
# fmt: on
