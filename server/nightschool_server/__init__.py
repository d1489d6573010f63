"""Serving: the gRPC service, engines, adapters, the agent runtime and the store.

Imports the wire (`nightschool_proto`) and nothing of the client or the learner.
"""
