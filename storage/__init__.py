"""What is on disk: atomic files and folders, locks, manifests, pictures and figures."""
