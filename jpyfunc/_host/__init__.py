"""The eager side: where and how a body is run."""
