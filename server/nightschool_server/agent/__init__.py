"""The agent loop and what it needs: reading tool calls, checking arguments, and who runs them."""
