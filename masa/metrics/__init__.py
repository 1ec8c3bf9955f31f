"""How close an edited picture is to its source and to its prompt, and what a sample of such numbers says."""
