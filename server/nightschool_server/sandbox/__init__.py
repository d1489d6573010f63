"""Where code that a model wrote runs: a process that sees its own workspace, a Python and nothing else."""
