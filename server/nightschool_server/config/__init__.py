"""Every setting: one frozen class a component, resolved from file, environment and command line."""
