"""How a request ends: one place decides what is written, told and answered (``docs/life-of-a-request.md``)."""
