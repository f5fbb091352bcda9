"""The test suite. `make test` runs it; CONTRIBUTING.md says what each rung proves."""
