"""The text of the functions that tokens held at a fixed number of places are in an ONNX model.

A step writes one place and moves none: there, rows stand in any order, and marks say which is which. Several steps at
once are put in order first, and leave it in order.
"""
