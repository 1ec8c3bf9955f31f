"""What calls sample(): recording a source, reruns, sheets of many runs, SDEdit, the demo."""
