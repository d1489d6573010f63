"""The engine on vLLM. Nothing here is imported before vLLM is known to be installed, `plugin.py` excepted."""
