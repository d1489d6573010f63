"""The SDK and the command line of nightschool."""
