"""Non-rigid edits measured against their exact truth, renders of the demo model's world."""
