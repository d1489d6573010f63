"""The wire: `nightschool.v1` and the code generated from it."""
