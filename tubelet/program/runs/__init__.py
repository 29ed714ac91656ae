"""`tubelet runs`: lists runs, shows one, follows one, compares several. It reads files only, and imports no torch."""
