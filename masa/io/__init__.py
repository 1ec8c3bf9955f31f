"""Pictures and files, read and written whole."""
