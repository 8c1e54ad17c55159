"""What a model does, measured: accuracy in context."""

from icl_lib.behaviours.accuracy import accuracy_table, published_accuracy

__all__ = ["accuracy_table", "published_accuracy"]
