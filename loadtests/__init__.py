"""Load tests: what the service holds, with locust as the client. `make loadtest`, or `python -m loadtests --help`."""
