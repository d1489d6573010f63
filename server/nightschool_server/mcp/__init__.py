"""MCP servers as a source of tools: their processes, sessions, and what their results become."""
