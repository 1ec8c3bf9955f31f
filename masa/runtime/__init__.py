"""How networks are built, offloaded and compiled."""
