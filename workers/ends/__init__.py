"""How a request ends: one place decides what is written, who is told and who is answered."""
