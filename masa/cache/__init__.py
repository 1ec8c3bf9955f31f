"""A source that is run once for many targets: recording it, holding it, handing its tensors to edits."""
