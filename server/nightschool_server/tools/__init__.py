"""Tools: what an application declares, their state, and the worker processes that run them."""
