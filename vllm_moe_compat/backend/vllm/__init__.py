"""The files that import vLLM: its platform, worker, sampler and configuration."""
