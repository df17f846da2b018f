"""Running plans on a GPU: the host decides what is launched, and never waits for what it brings."""
