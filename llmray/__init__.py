"""LLM fine-tuning on Ray clusters from one flat YAML whose keys are LLaMA-Factory's."""

__version__ = "0.1.0"
