"""Which test shows which property and which requirement: ``python -m tests.traceability`` writes docs/properties.md."""
