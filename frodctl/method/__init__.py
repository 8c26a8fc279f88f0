"""FRoD itself: the joint basis and the sparse pattern. No files, no command line."""
