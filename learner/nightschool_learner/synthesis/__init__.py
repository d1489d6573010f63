"""What stands between a writer's answer and a task: its files, found or made, and the checks that it passes."""
