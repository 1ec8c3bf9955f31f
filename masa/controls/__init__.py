"""Controls: frozen values that say which attention reads what. One file per published method."""
