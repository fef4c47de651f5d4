"""Stage one: sources, index, frozen encoders, and the feature store they fill."""
