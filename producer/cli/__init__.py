"""The command line: ``muai``, or ``python -m producer.cli``."""
