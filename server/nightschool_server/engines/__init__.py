"""Engines, one file each, behind the protocol in `nightschool_server.engine`."""
