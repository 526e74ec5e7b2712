"""The vLLM process, seen from outside: its arguments, environment, log, start, watch and end."""
