"""The scheduler service: queues, block tables, prefix cache and the public gRPC API. It never imports torch."""

__version__ = "0.1.0"
