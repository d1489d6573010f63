"""`python -m nightschool_learner.benchmarks gta --data DIR`."""

from nightschool_learner.benchmarks.main import main

if __name__ == "__main__":
    raise SystemExit(main())
