from tests.golden.oracle import oracle

__all__ = ["oracle"]
