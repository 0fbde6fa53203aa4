"""Lightning callbacks: everything that happens around an update, one file per concern."""
