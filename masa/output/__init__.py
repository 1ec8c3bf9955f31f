"""What a run gives: results and plots."""
