"""The cycle's report: what a cycle did and why it ended as it did, for somebody who never saw the code."""
