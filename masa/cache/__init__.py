"""What a source lends to targets, kept: recording it, holding it, lending it."""
