"""The commands of ``muai``, by what they look after."""
