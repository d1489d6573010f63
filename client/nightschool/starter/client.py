"""Ask the agent something, with a tool that runs here. The server must run: see README.md.

python client.py "What does the lamp cost?"
"""

from __future__ import annotations

import sys

from nightschool import Client, ToolCalled, ToolReturned

QUESTION = "How much is the plain mug?"
HOURS = {"saturday": "10 to 14", "sunday": "closed"}


def opening_hours(day: str) -> str:
    """When the shop is open.

    Args:
        day: A day of the week.
    """
    # A client's tool runs in this process, with all that it can reach; the server waits for its result.
    return HOURS.get(day.lower(), "9 to 18")


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else QUESTION
    # Address and token are found in the home folder, $NIGHTSCHOOL_HOME.
    with Client() as client:
        task = client.run_task(question, tools=[opening_hours])
        for event in task:
            if isinstance(event, ToolCalled):
                print(f"calls {event.call.name} {event.call.arguments}")
            elif isinstance(event, ToolReturned):
                print(f"gets {event.result.content}")
        result = task.result()
        print(f"{result.adapter} says {result.answer}")
        # Feedback is what practice begins with: tasks that went wrong come first.
        if question == QUESTION:
            client.feedback(result.response_id, good=result.answer.strip().endswith("9"))


if __name__ == "__main__":
    main()
