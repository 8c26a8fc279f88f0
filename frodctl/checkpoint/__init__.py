"""Weights in and out: sources, the safetensors codec, names and categories, sinks. No mathematics."""
