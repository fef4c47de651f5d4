"""What a store holds (`sail inspect`), and whether it is whole (`sail verify`)."""

from pipeline.inspection.description import describe_row, describe_store
from pipeline.inspection.verification import verify_store

__all__ = ["describe_row", "describe_store", "verify_store"]
