"""`python -m nightschool_learner --home DIR`."""

from nightschool_learner.main import main

if __name__ == "__main__":
    raise SystemExit(main())
