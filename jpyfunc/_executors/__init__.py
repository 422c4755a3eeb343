"""Host functions on an executor: from the call to the worker and back."""
