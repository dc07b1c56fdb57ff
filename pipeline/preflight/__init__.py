"""What is checked on every host before a run: docs/PREFLIGHT.md."""
